"""How quantized weights are trained."""
