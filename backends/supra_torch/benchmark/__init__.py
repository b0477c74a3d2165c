"""Measurements of the operators and of decoding, and what the kernels need of a GPU."""
