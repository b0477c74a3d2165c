"""Training text: read, tokenised, stored, and drawn from a model."""
