"""The best low-rank product of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """matrix (n, m) -> left (n, r), right (r, m), the best rank-r product in the Frobenius norm, the spectrum split evenly."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
