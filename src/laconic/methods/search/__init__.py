"""Choosing: who gets how much."""
