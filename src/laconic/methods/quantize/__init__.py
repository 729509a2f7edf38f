"""Fewer bits for each number: grids, rounding, corrections of what rounding lost."""
