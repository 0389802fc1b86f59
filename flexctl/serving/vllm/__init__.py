"""Masks of named experts in vLLM's own server: each request is answered by the experts that it may use."""
