"""OpenLM's checkpoints, which the published models are in."""
