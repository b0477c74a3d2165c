"""A model as a module, from any spec."""
