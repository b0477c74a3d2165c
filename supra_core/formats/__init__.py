"""Reading and writing weights, tensor by tensor: one file a format."""
