"""Less to carry between tokens: how keys and values of past tokens are stored, scored, shared and reused."""
