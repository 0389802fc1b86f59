"""Where router rows come from, and what they say before a model runs."""
