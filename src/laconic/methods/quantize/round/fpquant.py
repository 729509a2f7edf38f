"""FP quantization of diffusion models: weights and inputs in floats, bits split and biased as each tensor errs least.

Chen et al. 2024, arXiv:2408.06995, section 4. A float of b bits with e of exponent, m = b - 1 - e of mantissa and a real bias c ends at
2^(2^e - 1 - c) (2 - 2^-m), so a bias is a scale, and one that is greater clips.  Search: of all splits and of `steps` shares, from `most`
to `least`, of the tensor's greatest size as the end, what makes ||Q(x) - x||^2 least; for weights over the tensor, for inputs over some
rows of calibration inputs, which of a denoiser are drawn over all noise levels.  Each tensor has one split and one bias.
weight (n, m) -> codes (n, m) of b bits and a scale, 4 bytes; inputs (t, m) -> a split and a scale, 4 bytes. Tables are held so too; their
inputs are not rounded.  Rounding is to nearest; quantize.learn.fpround learns it.
Sibling: quantize.round.llmfp4 (a scale for each row, exponents of channels, the error of the layer's output)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Feeding, Packed, Soft, Way, below, restore
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Peaks, Sample
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.splits import Floated, Split, from_codes, nearest, numbers, searched, splits, to_codes

CARD = Card(Paper("Chen et al.", 2024, "arXiv:2408.06995", "section 4"), catalogue="fp-quant-diffusion", sibling="quantize.round.llmfp4")


class Single(Packed):
    """A matrix view in floats of one split and one scale. codes (n, ceil(m b / 8)) uint8, scale (1,) fp32."""

    form = "quantize.round.fpquant.Single"
    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], split: Split, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.shape, self.split = tuple(shape), split
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, shape: tuple[int, ...], split: Split, rank: Tensor, scale: Tensor) -> Self:
        """From ranks (n, m) and a scale (1,)."""
        return cls(shape, split, pack(to_codes(rank, split), split.bits), scale)

    @property
    def ranks(self) -> Tensor:
        """(n, m) int32."""
        return from_codes(unpack(self.codes, self.split.bits, self.matrix[1]), self.split)

    def dense(self) -> Tensor:
        return (numbers(self.ranks, self.split) * self.scale).reshape(self.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        codes = unpack(self.codes[index], self.split.bits, self.matrix[1])
        return numbers(from_codes(codes, self.split), self.split) * self.scale

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return None if way is None else way(self, target)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "exponent": self.split.exponent, "mantissa": self.split.mantissa}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        split = Split(described["exponent"], described["mantissa"])
        return cls(tuple(described["shape"]), split, tensors["codes"], tensors["scale"])


class Floating(Feeding):
    """`inner`, whose products round their inputs to floats of a split, times scale (1,) fp32."""

    form = "quantize.round.fpquant.Floating"
    scale: Tensor

    def __init__(self, inner: Packed, split: Split, scale: Tensor) -> None:
        super().__init__(inner)
        self.split = split
        self.register_buffer("scale", scale)

    @property
    def feed(self) -> Callable[[Tensor], Tensor]:
        return Floated(self.split, self.scale.clone())

    def over(self, inner: Packed) -> Floating:
        return Floating(inner, self.split, self.scale)

    def describe(self) -> dict[str, Any]:
        split = {"exponent": self.split.exponent, "mantissa": self.split.mantissa}
        return {"form": self.form, **split, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        inner = restore(described["inner"], below(tensors, "inner"))
        return cls(inner, Split(described["exponent"], described["mantissa"]), tensors["scale"])


@dataclass(frozen=True)
class SplitBits:
    """Level: bits of the weights and of their inputs, 3 to 8; inputs null: as they are."""

    bits: int = 4
    inputs: int | None = 8

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("inputs", self.inputs)):
            if bits is not None and not 3 <= bits <= 8:
                raise ValueError(f"{name}={bits}: floats have 3 to 8 bits")


@dataclass(frozen=True)
class FPQuant(Transform):
    """most, least: shares of the greatest size that are tried as a tensor's end; steps: how many; rows: inputs that are looked at."""

    most: float = 1.2
    least: float = 0.3
    steps: int = 19
    rows: int = 256

    acts_on = (Linear, Conv, Embedding)
    level = SplitBits

    @property
    def wants(self) -> tuple[Sample, Peaks]:  # type: ignore[override]
        """Some inputs, and the largest of each channel."""
        return Sample(self.rows), Peaks()

    def best(self, x: Tensor, greatest: Tensor, tried: list[Split]) -> tuple[Split, Tensor]:
        """The split and scale (1,) of least squared error of x."""
        return searched(x, greatest, tried, most=self.most, least=self.least, steps=self.steps)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: SplitBits) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        split, scale = self.best(weight, weight.abs().max(), splits(level.bits))
        form: Packed = Single.of(site.shape, split, nearest(weight / scale, split), scale)
        if level.inputs is not None and not isinstance(site.kind, Embedding):
            inputs, peaks = (stats[kind] for kind in self.wants)
            form = Floating(form, *self.best(inputs, peaks.max(), splits(level.inputs)))
        return Change(hold={site.tensors["weight"]: form})

    def stored(self, site: Site, level: SplitBits) -> int:
        n, m = site.matrix
        fed = level.inputs is not None and not isinstance(site.kind, Embedding)
        return n * packed_width(m, level.bits) + 4 + 4 * fed
