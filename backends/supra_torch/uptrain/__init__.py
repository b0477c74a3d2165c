"""Uptraining: stages, data, checkpoints, metrics."""
