"""Reading text, the one training loop, its checkpoints."""
