"""Searching plans by mutation and selection, each judged whole."""
