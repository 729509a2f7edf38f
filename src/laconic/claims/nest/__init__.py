"""Claims of the family nest."""
