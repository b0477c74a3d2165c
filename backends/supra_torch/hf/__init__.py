"""The files that let stock transformers load an artifact; they are copied into its folder."""
