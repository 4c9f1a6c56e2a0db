"""The demo: its tasks, its workflows and its run."""
