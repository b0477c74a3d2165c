"""One module a command; heavy imports stand inside the functions."""
