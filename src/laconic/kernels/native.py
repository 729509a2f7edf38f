"""The native kernels: whether they were built, and what this processor can run of them.

LACONIC_KERNELS chooses: `avx512`, `avx2`, `plain` (C++ for any processor) or `reference` (torch alone); otherwise the best there is."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

# torch first: the native library then shares its threads
import torch  # noqa: F401

LEVELS = ("reference", "plain", "avx2", "avx512")


class Native(NamedTuple):
    """The module and the instructions that it is to use."""

    module: Any
    level: str


@lru_cache(maxsize=1)
def native() -> Native | None:
    """What there is; None, said once, where only the reference is left."""
    wanted = os.environ.get("LACONIC_KERNELS", "")
    if wanted and wanted not in LEVELS:
        warnings.warn(f"LACONIC_KERNELS={wanted} is none of {', '.join(LEVELS)}; the best that is there is taken", stacklevel=2)
        wanted = ""
    if wanted == "reference":
        return None
    try:
        from laconic.kernels.cpu import _native  # type: ignore[attr-defined]
    except ImportError:
        warnings.warn(
            "laconic was installed without its native kernels, so compressed layers compute with torch, slowly; install a C++ compiler "
            "and install laconic again",
            stacklevel=2,
        )
        return None
    best = _native.best()
    return Native(_native, min(best, wanted or best, key=LEVELS.index))
