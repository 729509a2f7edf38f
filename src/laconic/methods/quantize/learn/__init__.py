"""Rounding that is learned on grids of floats, where the next number up or down is a step away that depends on the number."""
