"""flexctl: the life of an expert in FlexOlmo-style language models."""
