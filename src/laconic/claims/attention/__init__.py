"""Claims of attention."""
