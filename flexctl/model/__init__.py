"""Torch modules: the routed feed-forward block, and models built from weights."""
