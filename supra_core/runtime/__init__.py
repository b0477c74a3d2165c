"""Running a model: backends, sampling, conversations, batches and their states."""
