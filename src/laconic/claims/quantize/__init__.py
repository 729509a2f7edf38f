"""Claims of the quantizers."""
