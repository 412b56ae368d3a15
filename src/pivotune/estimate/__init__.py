"""What a run will need before it starts: memory, steps, operations and time."""
