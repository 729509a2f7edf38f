"""Pure tensor maths with a plain reference each; takes tensors and small frozen dataclasses, knows no model, no site and no file."""
