"""A run on disk: recipes write it, reports read it."""
