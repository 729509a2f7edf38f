"""JLCM's clusters: output neurons with weights alike share a codebook, and there are a few codebooks to a matrix.

Yvinec et al. 2023, arXiv:2309.17361, section 3.1: neurons (rows) are grouped by how their weights are distributed, and each group has a
codebook of k-means levels. Alike means: quantile functions of rows at 16 places, whose squared distance is that of Wasserstein between the
distributions, clustered by k-means. No data is needed.  weight (n, m) -> codes (n, m), tables (g, 2^b), member (n,).
Codes and tables learn together afterwards, `quantize.train.proximal`.
Sibling: quantize.round.lloyd (one codebook, scales for groups of a row)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.levels import Levels, encode, fit_table
from laconic.kernels.vectors import kmeans, nearest
from laconic.methods.quantize.grid.clusters import Clustered

CARD = Card(Paper("Yvinec et al.", 2023, "arXiv:2309.17361", "section 3.1"), catalogue="jlcm", sibling="quantize.round.lloyd")

PLACES = 16


def alike(weight: Tensor, groups: int) -> Tensor:
    """weight (n, m) -> (n,) which of at most `groups` clusters each row is in, without gaps; rows of one distribution are in one."""
    places = (torch.arange(PLACES) + 0.5) / PLACES
    found = weight.float().quantile(places, dim=1).T.contiguous()
    table = kmeans(found, torch.ones_like(found), min(groups, len(found)), torch.Generator().manual_seed(0))
    member = nearest(found, table)
    return member.unique(return_inverse=True)[1]


def fitted(weight: Tensor, member: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """weight (n, m) and the cluster of each row -> codes (n, m) uint8, tables (groups, 2^bits) with bf16 values; those of clusters that
    no row is in are zeros."""
    levels = Levels.codebook(bits, None)
    codes, tables = torch.zeros(weight.shape, dtype=torch.uint8), torch.zeros(groups, 2**bits)
    for cluster in member.unique().tolist():
        rows = weight[member == cluster]
        # a table knows numbers up to 1: in parts of the greatest
        peak = rows.abs().max().clamp(min=2.0**-100)
        scale = peak.expand(len(rows), 1)
        tables[cluster] = (fit_table(rows, scale, levels).float() * peak).bfloat16().float()
        codes[member == cluster] = encode(rows, torch.ones_like(scale), levels, tables[cluster])
    return codes, tables


@dataclass(frozen=True)
class Clusters:
    """Level: bits of a code, and codebooks of a matrix (fewer where it has fewer rows)."""

    bits: int
    groups: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: codes have 1 to 8 bits")
        if not 1 <= self.groups <= 256:
            raise ValueError(f"groups={self.groups}: a matrix has 1 to 256 codebooks")


@dataclass(frozen=True)
class JLCM(Transform):
    """Codebooks of clusters of rows."""

    acts_on = (Linear, Conv)
    level = Clusters

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Clusters) -> Change:
        n, m = site.matrix
        groups = min(level.groups, n)
        weight = weights["weight"].float().reshape(n, m)
        member = alike(weight, groups)
        codes, tables = fitted(weight, member, level.bits, groups)
        return Change(hold={site.tensors["weight"]: Clustered.of(site.shape, codes, tables, member)})

    def stored(self, site: Site, level: Clusters) -> int:
        n, m = site.matrix
        return Clustered.bytes_of(n, m, level.bits, min(level.groups, n))
