"""Comparisons of routing policies: jobs, tuning, capacity, targets, ratios with intervals, claims and plots."""
