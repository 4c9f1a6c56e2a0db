"""Scheduler agents: pure decisions, messages in, messages and actions out."""
