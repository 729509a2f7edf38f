"""Choosing examples: which documents of a pool are worth calibrating or training on."""
