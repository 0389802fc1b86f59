"""Scoring models on text."""
