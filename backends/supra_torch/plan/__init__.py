"""What a run will need: memory, time and cost."""
