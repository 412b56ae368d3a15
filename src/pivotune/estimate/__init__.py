"""Estimate of a run before it starts: memory, steps, operations and time."""
