"""Which of some sizes are outliers: a coarse rule says which may be, a fine one where they begin."""

from __future__ import annotations

import torch
from torch import Tensor

# quartiles of more sizes than this are those of evenly spaced ones
MANY = 2**20


def fence(sizes: Tensor, reach: float) -> float:
    """sizes (k,), 0 or more -> Q3 + reach (Q3 - Q1): what lies above may be an outlier. Tukey 1977, section 2."""
    some = sizes.sort().values
    quartiles = some[:: max(1, len(some) // MANY)].float().quantile(torch.tensor([0.25, 0.75], device=sizes.device))
    return float(quartiles[1] + reach * (quartiles[1] - quartiles[0]))


def parting(sizes: Tensor, reach: float = 1.5, weigh: float = 1.0) -> float:
    """The largest of sizes (k,), 0 or more, that is no outlier. Of those above the fence, rising o_1 .. o_n, the last ones o_i .. o_n are
    outliers for the i of the greatest (o_i - o_(i-1))^2 - weigh var(o_1 .. o_(i-1)), o_0 being the largest size below the fence; of
    equal ones the first. The greatest size where none is above the fence, and where no cut is better than none (0 or less). What is zero
    (dead channels, pruned weights) does not count."""
    rising = sizes[sizes > 0].float().sort().values
    if not len(rising):
        return 0.0
    above = rising > fence(rising, reach)
    candidates = rising[above].double()
    if not len(candidates) or bool(above.all()):
        return float(rising[-1])
    before = torch.cat([rising[~above][-1:].double(), candidates[:-1]])
    count = torch.arange(len(candidates), device=sizes.device).clamp(min=1)
    # mean and mean square of those that stay, none for the first cut
    kept = [torch.cat([candidates.new_zeros(1), x.cumsum(0)[:-1]]) / count for x in (candidates, candidates.square())]
    worth = (candidates - before).square() - weigh * (kept[1] - kept[0].square()).clamp(min=0)
    best = int(worth.argmax())
    return float(before[best]) if float(worth[best]) > 0 else float(rising[-1])
