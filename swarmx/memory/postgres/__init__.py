"""The same stores in PostgreSQL, for several gateways that share their workflows."""
