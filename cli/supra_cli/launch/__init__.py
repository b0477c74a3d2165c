"""Job files of schedulers."""
