"""Running a model in torch."""
