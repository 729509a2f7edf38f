"""Claims of the methods that choose examples."""
