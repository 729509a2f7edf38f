"""Texts as counts of hashed n-grams: what two samples of text are compared by. Plain reference; linear in the text's length."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

# runs of letters and digits, runs of other signs
WORD = re.compile(r"\w+|[^\w\s]+")


def words(text: str) -> list[str]:
    """The words and signs of a text, in lower case."""
    return WORD.findall(text.lower())


def ngram_counts(texts: Sequence[str], *, buckets: int, order: int) -> Tensor:
    """Counts of all n-grams of 1 to `order` words, hashed into `buckets` by CRC-32: fp32 (texts, buckets)."""
    found = torch.zeros(len(texts), buckets)
    for i, text in enumerate(texts):
        sequence = words(text)
        for n in range(1, order + 1):
            grams = (" ".join(sequence[j : j + n]) for j in range(len(sequence) - n + 1))
            index = torch.tensor([zlib.crc32(gram.encode("utf-8", "surrogatepass")) % buckets for gram in grams], dtype=torch.int64)
            found[i] += torch.bincount(index, minlength=buckets)
    return found


def log_ratio(target: Tensor, pool: Tensor, smoothing: float) -> Tensor:
    """log(p_target + s) - log(p_pool + s) of counts (m,), fp64 (m,); counts that sum to zero are no preference."""
    p, q = (counts.double() / counts.double().sum().clamp(min=1) for counts in (target, pool))
    return (p + smoothing).log() - (q + smoothing).log()


def kl_of_counts(p: Tensor, q: Tensor, smoothing: float) -> float:
    """KL(p || q) in nats of two count vectors (m,), both smoothed by s and normalized."""
    a, b = (counts.double() / counts.double().sum().clamp(min=1) + smoothing for counts in (p, q))
    a, b = a / a.sum(), b / b.sum()
    return float((a * (a / b).log()).sum())
