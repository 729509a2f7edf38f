"""Scales of channels that move difficulty from inputs to weights, or among weights, and leave what a model computes as it is."""
