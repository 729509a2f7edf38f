"""Claims of the decoders."""
