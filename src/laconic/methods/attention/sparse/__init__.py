"""Attention that looks at some of the past: which blocks of it are worth the work."""
