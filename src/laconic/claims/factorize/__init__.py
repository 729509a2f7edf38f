"""Claims of factorised matrices."""
