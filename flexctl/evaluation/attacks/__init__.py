"""Attacks that an owner runs on a model to learn what it gives away of their text."""
