"""Arithmetic of modules in bf16, where a processor multiplies pairs of bf16 in one instruction and is faster so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from laconic.kernels.place import device


@lru_cache(maxsize=1)
def pairs() -> bool:
    """Whether the processor multiplies pairs of bf16: AVX-512 BF16, or AMX."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


def narrowly(wanted: bool = True) -> AbstractContextManager[object]:
    """Products and convolutions of modules in bf16, all else in their own dtype, where that is wanted and faster; else as they are."""
    kind = device().type
    faster = wanted and (pairs() if kind == "cpu" else kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(kind, torch.bfloat16) if faster else nullcontext()
