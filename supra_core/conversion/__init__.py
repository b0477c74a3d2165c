"""From a transformer to a recurrent model."""
