"""Fits of the constants in swarmx/core/data from public tables."""
