"""A small trial of each kernel on a device: None where it gives what its reference gives, else what was wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.kernels import attention, blocks, linear, lookup
from laconic.kernels import hadamard as turning
from laconic.kernels.attention import Grouped, Part, Plain
from laconic.kernels.gpu import attention as attention_kernels
from laconic.kernels.gpu import hadamard as turning_kernels
from laconic.kernels.gpu import linear as kernels
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels

# outputs, inputs (the last group is shorter), weights of a group
N, M, GROUP = 48, 200, 32
# norm of the difference over the norm: outputs in bf16, weights rounded to it or not
NEAR = 2.0**-7


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8, device="cpu")


def _far(found: Tensor, wanted: Tensor, near: float = NEAR) -> str | None:
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return None if error <= near else f"it is {error:.2g} from the reference on a trial, {near:.2g} is allowed"


def _grouped(device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Grid]:
    codes, scales, zeros = _bytes(N, M // 2), _drawn(N, -(-M // GROUP)).bfloat16(), _bytes(N, -(-M // GROUP // 2))
    return (codes.to(device), scales.to(device), zeros.to(device)), Grid(4, GROUP)


def _levels(device: torch.device) -> tuple[tuple[Tensor, Tensor, None, None], Levels]:
    # no code of NaN
    codes = _bytes(N, M) & 0x77
    return (codes.to(device), _drawn(N, 1).bfloat16().to(device), None, None), Levels.fp8()


def grouped_linear(device: torch.device) -> str | None:
    """One row, and more than one tile."""
    given, grid = _grouped(device)
    for rows in (1, 70):
        x = _drawn(rows, M).bfloat16().to(device)
        found = kernels.grouped_linear(x, *given, 4, GROUP)
        if (wrong := _far(found, linear.reference_linear(x, *given, grid))) is not None:
            return wrong
    return None


def grouped_dense(device: torch.device) -> str | None:
    """The same numbers."""
    given, grid = _grouped(device)
    return _far(kernels.grouped_dense(*given, 4, GROUP, M), linear.reference_dense(*given, grid, M), 0.0)


def lookup_linear(device: torch.device) -> str | None:
    """One row, and more than one tile."""
    given, levels = _levels(device)
    for rows in (1, 70):
        x = _drawn(rows, M).bfloat16().to(device)
        found = kernels.lookup_linear(x, *given, levels.bits, levels.table, 0, levels.scales)
        if (wrong := _far(found, lookup.reference_linear(x, *given, levels))) is not None:
            return wrong
    return None


def lookup_dense(device: torch.device) -> str | None:
    """The same numbers."""
    given, levels = _levels(device)
    found = kernels.lookup_dense(*given, levels.bits, levels.table, 0, levels.scales, M)
    return _far(found, lookup.reference_dense(*given, levels, M), 0.0)


def block_attention(device: torch.device) -> str | None:
    """Blocks of which some are left out."""
    query, key, value = (x.bfloat16().to(device) for x in (_drawn(1, 4, 90, 64), _drawn(1, 2, 100, 64), _drawn(1, 2, 100, 64)))
    keep = _drawn(1, 4, 3, 4).to(device) > 0
    found = attention_kernels.block_attention(query, key, value, keep, 32)
    return _far(found, blocks.block_attention(query, key, value, keep, 32))


def _cached(device: torch.device, along: bool) -> list[Part]:
    """Two heads of 64 channels: 96 tokens in codes of 2 bits in groups of 32, in two pages, and 5 as they are."""
    entries, rows, width = (3, 64, 8) if along else (96, 1, 16)
    codes, groups = _bytes(1, 2, entries, rows, width), 1 if along else 2
    scales, zeros = _drawn(1, 2, entries, rows, groups).bfloat16(), _drawn(1, 2, entries, rows, groups).bfloat16()
    first = 2 if along else 64
    paged = [tuple(some.contiguous().to(device) for some in one.split(first, 2)) for one in (codes, scales, zeros)]
    return [Grouped(paged[0], paged[1], paged[2], (entries,), 2, 32, along, 64), Plain((_drawn(1, 2, 5, 64).bfloat16().to(device),), (5,))]


def held_attention(device: torch.device) -> str | None:
    """New tokens over codes and tokens as they are."""
    keys, values = _cached(device, True), _cached(device, False)
    for t in (1, 3):
        query = _drawn(1, 4, t, 64).bfloat16().to(device)
        found = attention_kernels.held_attention(query, keys, values)
        if (wrong := _far(found, attention.attended_here(query, keys, values))) is not None:
            return wrong
    return None


def _turned(device: torch.device, name: str) -> str | None:
    """Widths with a small factor, and without."""
    for n in (64, 96):
        x = _drawn(3, n).bfloat16().to(device)
        if (wrong := _far(getattr(turning_kernels, name)(x), getattr(turning, f"reference_{name}")(x))) is not None:
            return wrong
    return None


def hadamard(device: torch.device) -> str | None:
    """One direction."""
    return _turned(device, "hadamard")


def unhadamard(device: torch.device) -> str | None:
    """The other one."""
    return _turned(device, "unhadamard")
