"""Corrections added to a quantized matrix."""
