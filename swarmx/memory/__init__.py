"""What outlives a process: workflows, their events, calls and decisions."""
