"""Claims of pruning."""
