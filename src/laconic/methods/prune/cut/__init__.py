"""Removing what a score ranks lowest, and holding what is left."""
