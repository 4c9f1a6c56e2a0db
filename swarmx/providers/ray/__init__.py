"""Replicas on the nodes of a Ray cluster: actors that Ray places, and a process here that speaks with it."""
