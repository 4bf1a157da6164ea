"""A MODEL whose network runs in worker processes, one for each card."""
