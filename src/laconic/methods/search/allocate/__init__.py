"""Buying rows of a menu within a budget."""
