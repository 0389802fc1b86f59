"""Text from files and data sets: read, tokenised, framed, sampled."""
