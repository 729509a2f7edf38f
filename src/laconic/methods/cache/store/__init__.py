"""How cached tokens are held."""
