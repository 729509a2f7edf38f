"""Orthogonal changes of basis under which numbers are easier to round, and the parts of a model that they need."""
