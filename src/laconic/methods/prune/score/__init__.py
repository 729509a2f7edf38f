"""Importance of weights, channels, heads, layers."""
