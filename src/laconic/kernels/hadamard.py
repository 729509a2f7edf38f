"""The normalised Hadamard transform of any width: x H with entries of H that are all of size 1 / sqrt(n), so that what lies in one channel
is spread evenly over all.

H is the Kronecker product of a small matrix and Sylvester's of a power of two, which is applied in log2 steps. The small one is Paley's
(1933) where the width has a factor of which that construction gives a Hadamard matrix (12, 20, 28, 60, ...). Other widths have none that is
known, or none at all: there it is Hartley's matrix of the odd factor, orthogonal too, with entries of at most sqrt(2 / n). On a GPU both
directions are operators of torch.ops.laconic, made of torch's operations unless a kernel takes their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.kernels.place import kept

_OPS = torch.library.Library("laconic", "FRAGMENT")
_OPS.define("hadamard(Tensor x) -> Tensor")
_OPS.define("unhadamard(Tensor x) -> Tensor")


def _residues(q: int) -> Tensor:
    """(q, q) Jacobsthal's matrix of a prime: 1 where i - j is a square, -1 where not, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    sign = torch.tensor([0 if i == 0 else 1 if i in squares else -1 for i in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    return sign[(index[:, None] - index[None, :]) % q]


def _prime(q: int) -> bool:
    return q > 2 and all(q % i for i in range(2, math.isqrt(q) + 1))


def paley(n: int) -> Tensor | None:
    """A Hadamard matrix (n, n) of entries +-1 by Paley's two constructions; None where neither gives one."""
    if _prime(n - 1) and (n - 1) % 4 == 3:
        inner, sign = _residues(n - 1), -1.0
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, sign, inner
        return skew + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if n % 4 == 0 and _prime(q) and q % 4 == 1:
        inner = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        inner[0, 1:], inner[1:, 0], inner[1:, 1:] = 1.0, 1.0, _residues(q)
        off, on = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
        return torch.kron(inner, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)
    return None


@kept
def _base(n: int) -> Tensor:
    """The small factor of width n's transform, orthonormal, fp64: what is left of n is a power of two."""
    odd = n // (n & -n)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    size = 4 * odd
    while n % size == 0:
        if (found := paley(size)) is not None:
            return found / math.sqrt(size)
        size *= 2
    turns = torch.outer(torch.arange(odd), torch.arange(odd)).double() % odd
    angle = 2 * math.pi * turns / odd
    return (angle.cos() + angle.sin()) / math.sqrt(odd)


def _sylvester(x: Tensor) -> Tensor:
    """Along the last axis, a power of two, not normalised."""
    n = x.shape[-1]
    step = 1
    while step < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
        step *= 2
    return x


def _along(x: Tensor, base: Tensor) -> Tensor:
    n, b = x.shape[-1], base.shape[0]
    spread = _sylvester(x.reshape(*x.shape[:-1], b, n // b)) / math.sqrt(n // b)
    if b > 1:
        spread = torch.einsum("...ij,ik->...kj", spread, base.to(x))
    return spread.reshape(x.shape)


def hadamard(x: Tensor) -> Tensor:
    """x (..., n) -> x H, the same shape and length."""
    return torch.ops.laconic.hadamard(x) if x.is_cuda else reference_hadamard(x)  # type: ignore[no-any-return]


def unhadamard(x: Tensor) -> Tensor:
    """x (..., n) -> x H^T, which undoes `hadamard`."""
    return torch.ops.laconic.unhadamard(x) if x.is_cuda else reference_unhadamard(x)  # type: ignore[no-any-return]


def reference_hadamard(x: Tensor) -> Tensor:
    """hadamard by torch's own operations."""
    return _along(x, _base(x.shape[-1]))


def reference_unhadamard(x: Tensor) -> Tensor:
    """unhadamard by torch's own operations."""
    return _along(x, _base(x.shape[-1]).T)


for _name, _plain in (("hadamard", reference_hadamard), ("unhadamard", reference_unhadamard)):
    for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA"):
        _OPS.impl(_name, _plain, _key)
    torch.library.register_fake(f"laconic::{_name}", torch.empty_like, lib=_OPS)
