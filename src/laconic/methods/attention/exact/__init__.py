"""The same result, computed otherwise."""
