"""Where replicas come from."""
