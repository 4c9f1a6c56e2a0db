"""Measurements, fits and experiments around SwarmX; nothing here runs in production."""
