"""Narrower models that are the first channels of wider ones."""
