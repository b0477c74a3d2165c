"""Job files: an uptraining run on one or many nodes, started again until it is done."""
