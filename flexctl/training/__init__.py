"""The one training loop, what it trains, its batches and its checkpoints."""
