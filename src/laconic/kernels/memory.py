"""What the C library does with memory that is given back."""

from __future__ import annotations

import ctypes

# blocks from this size on are the system's own again as soon as they are freed
LARGE = 16 * 1024**2
# glibc's name for it (M_MMAP_THRESHOLD)
_THRESHOLD = -3


def give_back() -> bool:
    """From now on freed tensors of LARGE bytes and more leave the process at once. False where there is no such switch.

    Left to itself glibc raises that size to 32 MiB and keeps what is below it in one heap, where a few small blocks on top of large free
    ones hold gigabytes."""
    try:
        switch = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(switch(_THRESHOLD, LARGE))
