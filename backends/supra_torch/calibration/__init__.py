"""A start without a gradient step."""
