"""SwarmX: scheduler agents for agentic workflows."""
