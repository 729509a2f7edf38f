"""Token by token."""
