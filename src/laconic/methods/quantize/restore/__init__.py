"""How weights are moved before they are quantized."""
