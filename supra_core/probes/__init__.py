"""Questions put to a model through the backend protocol, beyond perplexity and tasks."""
