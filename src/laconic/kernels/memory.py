"""What the C library does with memory that is given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

# blocks from this size on are the system's own again as soon as they are freed
LARGE = 16 * 1024**2
# glibc's name for it (M_MMAP_THRESHOLD)
_THRESHOLD = -3


def give_back() -> bool:
    """From now on freed tensors of LARGE bytes and more leave the process at once. False where there is no such switch.

    Left to itself glibc raises that size to 32 MiB and keeps what is below it in one heap, where a few small blocks on top of large free
    ones hold gigabytes."""
    switch = _glibc("mallopt")
    return switch is not None and bool(switch(_THRESHOLD, LARGE))


def trim() -> bool:
    """What lies free between blocks that are held leaves the process now: milliseconds. False where there is no such call.

    For whoever makes many small tensors that stay among larger ones that go: the holes fit nothing that comes later, and grow."""
    call = _glibc("malloc_trim")
    return call is not None and bool(call(0))


def _glibc(name: str) -> Callable[..., int] | None:
    try:
        return cast(Callable[..., int], getattr(ctypes.CDLL(None), name))
    except (AttributeError, OSError, TypeError):
        return None
