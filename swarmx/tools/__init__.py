"""The verbs of operators and of the coordinator: typed, bounded, shown before they are done, undone where possible."""
