"""Products that leave out what is multiplied with zero: `skipped` reads of its matrices only the rows whose factor is none.

For one token at a time, where reading weights is all the work. The kernel is kernels/cpu/skip.cpp; rows are shared out between threads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.native import native

STORED = (torch.float32, torch.bfloat16)


def lined(matrix: Tensor) -> Tensor:
    """(n, m) with its columns, not its rows, in one line each: the same numbers; itself where they lie so."""
    return matrix if matrix.t().is_contiguous() else matrix.t().contiguous().t()


def skipped(a: Tensor, down: Tensor, x: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """sum over j with a_j != 0 of a_j down[:, j], or of a_j (x . up_j + bias_j) down[:, j] -> (t, n) fp32.

    a (t, h), down (n, h), x (t, m), up (h, m), bias (h,). What is not asked for is not read where `down` is `lined`, matrices are in one
    dtype, fp32 or bf16, and the native kernels are there. ValueError for other shapes."""
    t, h = a.shape
    n = down.shape[0]
    if down.shape[1] != h or (x is None) != (up is None) or (bias is not None and (up is None or bias.shape != (h,))):
        raise ValueError(f"down {tuple(down.shape)}, up and bias do not fit a of {tuple(a.shape)}")
    if x is not None and up is not None and (x.shape[0] != t or up.shape != (h, x.shape[1])):
        raise ValueError(f"x {tuple(x.shape)} and up {tuple(up.shape)} do not fit a of {tuple(a.shape)}")
    there = native()
    held = [matrix for matrix in (down.t(), up) if matrix is not None]
    plain = all(one.device.type == "cpu" and one.dtype == down.dtype in STORED and one.is_contiguous() for one in held)
    if there is None or not plain or torch.compiler.is_compiling():
        return reference_skipped(a, down, x, up, bias)
    given = [one if one is None else one.detach().float().contiguous() for one in (a, x, bias)]
    out = torch.empty(t, n)
    places = [0 if one is None else one.data_ptr() for one in (*given, up)]
    there.module.skip(
        places[0], places[1], places[3], places[2], down.data_ptr(), down.dtype == torch.bfloat16, t, 0 if x is None else x.shape[1], h, n,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def reference_skipped(a: Tensor, down: Tensor, x: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """skipped by torch's own operations, row by row."""
    out = []
    for i in range(len(a)):
        needed = a[i].nonzero()[:, 0]
        factor = a[i, needed].float()
        if x is not None and up is not None:
            factor = factor * F.linear(x[i].float(), up[needed].float(), None if bias is None else bias[needed].float())
        out.append(F.linear(factor[None], down[:, needed].float())[0])
    return torch.stack(out) if out else a.new_zeros(0, down.shape[0], dtype=torch.float32)
