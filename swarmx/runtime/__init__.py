"""The shells around the agents: clocks, timers, journal, connections to replicas."""
