"""How many threads a stretch of work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# weights of a matrix below which its many small operations are faster in one thread
SMALL = 1024 * 1024


@contextmanager
def suited(weights: int) -> Iterator[None]:
    """One thread for work on a matrix of few `weights`: waking a second thread costs more than it saves, far more on a busy machine.
    torch's thread count is as before on leaving."""
    before = torch.get_num_threads()
    if weights < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
