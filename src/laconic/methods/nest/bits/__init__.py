"""Weights as sums of parts of about a bit each."""
