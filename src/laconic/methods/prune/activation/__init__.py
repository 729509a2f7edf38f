"""Leaving out what is small for a token, token by token."""
