"""Tools of workflows: programs in a sandbox, HTTP through a guard, MCP servers; and the replica that has them."""
