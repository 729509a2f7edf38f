"""How low-bit tensors are held."""
