"""How many threads a stretch of work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# weights of a matrix below which its many small operations are faster in one thread
SMALL = 1024 * 1024


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads; as many as before on leaving."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def suited(weights: int) -> AbstractContextManager[None]:
    """One thread for work on a matrix of few `weights`: waking a second thread costs more than it saves, far more on a busy machine.
    torch's thread count is as before on leaving."""
    return threads(1) if weights < SMALL else nullcontext()
