"""The demo's three workflows, as YAML."""
