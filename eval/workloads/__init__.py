"""Workloads of the simulator: workflows whose calls, lengths and gaps come from real traces where there are any."""
