"""Layers that mix cheap primitives with multiplications."""
