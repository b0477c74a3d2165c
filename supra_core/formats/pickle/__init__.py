"""torch's pickled checkpoints, read without running them."""
