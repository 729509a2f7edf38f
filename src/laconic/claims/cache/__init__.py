"""Claims of the caches."""
