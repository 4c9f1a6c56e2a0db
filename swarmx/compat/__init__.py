"""What runs inside other systems: SwarmX's agents in the place of their schedulers."""
