"""Fewer numbers by products: matrices as factors of low rank or in shared pieces, and how such models run."""
