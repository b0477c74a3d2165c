"""Text to train on: documents from many formats, tokenised once into shards."""
