"""What a model is: its spec, its tensors, its definition."""
