"""Which expert answers: what router rows say before a model runs."""
