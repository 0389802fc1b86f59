"""Torch modules: the routed feed-forward block, models built from weights, router rows and their space."""
