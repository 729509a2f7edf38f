"""A matrix as a product of two narrow ones."""
