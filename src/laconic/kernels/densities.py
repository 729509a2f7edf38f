"""Answers that are real numbers, as log-densities: those of a unit normal about the number, up to a constant, at evenly spaced bins. The KL
of two such answers is half their squared difference, in nats, so that they are judged as classes are."""

from __future__ import annotations

import torch
from torch import Tensor

# how many bins, and the outermost of them
BINS, OUTERMOST = 16, 4.0


def bins(device: torch.device | None = None) -> Tensor:
    """Where the bins lie, (BINS,)."""
    return torch.linspace(-OUTERMOST, OUTERMOST, BINS, device=device)


def densities(values: Tensor) -> Tensor:
    """values (...) -> log-densities (..., BINS)."""
    return -0.5 * (values[..., None] - bins(values.device)).square()


def means(logits: Tensor) -> Tensor:
    """Log-densities (..., BINS) -> the numbers (...) that they are about, from the first and the last of them."""
    return (logits[..., -1] - logits[..., 0]) / (2 * OUTERMOST)
