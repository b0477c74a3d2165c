"""What a model is worth: perplexity, tasks, probes, and comparisons of backends."""
