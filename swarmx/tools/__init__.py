"""The verbs of operators and of the coordinator over `core.actions`. Nothing is in here yet."""
