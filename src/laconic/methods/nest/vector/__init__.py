"""Embeddings whose first numbers are embeddings."""
