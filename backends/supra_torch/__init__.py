"""The Torch backend: a model from any spec, its operators, and uptraining."""
