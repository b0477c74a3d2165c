"""One run on many devices."""
