"""Training tasks, one a network."""
