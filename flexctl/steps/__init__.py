"""What several commands do, above the libraries and below the engine."""
