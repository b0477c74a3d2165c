"""Talking to a model: the session, its commands, and the terminal."""
