"""DSIR: the log importance weight of a document, how much likelier its n-grams are in a target sample than in the pool it comes from.

score[i] = sum_j z[i, j] (log p_target[j] - log p_pool[j]), with z[i] the counts of unigrams and bigrams of document i hashed into
10,000 buckets and p the share of each bucket in a sample.  Xie et al. 2023, arXiv:2302.03169, section 3.
weight (documents, buckets) counts, totals (buckets,) -> (documents,), in nats.
Drawn without replacement by search.sample.gumbel.  Sibling: prune.score.magnitude (of weights, without a target)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.score import Score, Unit
from laconic.core.statistic import Statistic, Total
from laconic.kernels.ngrams import log_ratio

CARD = Card(Paper("Xie et al.", 2023, "arXiv:2302.03169", "section 3"), catalogue="dsir", sibling="prune.score.magnitude")


def log_weights(counts: Tensor, target: Tensor, pool: Tensor, smoothing: float) -> Tensor:
    """counts (documents, m), target and pool (m,) totals -> (documents,) log importance weights."""
    return counts.double() @ log_ratio(target, pool, smoothing)


@dataclass(frozen=True)
class DSIR(Score):
    """smoothing: added to each bucket's share, so that a bucket that a sample lacks is unlikely, not impossible."""

    smoothing: float = 1e-8
    wants = (Total("target"), Total("pool"))

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return log_weights(unit.weight, stats[Total("target")], stats[Total("pool")], self.smoothing)
