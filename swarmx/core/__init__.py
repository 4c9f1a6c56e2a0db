"""Nouns, messages, actions, ports, forecasts, the engine step model and errors. Imports nothing above it."""
