"""Searches that draw: the plan is a sample, so that what is chosen stays as varied as what it was chosen from."""
