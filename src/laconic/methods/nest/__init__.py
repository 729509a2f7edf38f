"""Models within a model: what is held in parts, in an order in which every prefix is a smaller model."""
