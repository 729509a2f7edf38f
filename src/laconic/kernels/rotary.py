"""Rotary positions: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """x (b, h, t, d) with d even, positions (b, t) -> x with each pair (i, i + d / 2) turned by position * base^(-2 i / d), so that
    products of two depend on their distance alone. Su et al. 2021, arXiv:2104.09864, eq. 34."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.float()[:, None, :, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
