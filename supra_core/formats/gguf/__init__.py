"""GGUF files: weights, tokenizer and config in one."""
