"""Layers of products that run without storing what is wide between them."""
