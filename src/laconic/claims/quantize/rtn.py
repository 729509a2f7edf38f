"""Claims of rounding to nearest: the noise it makes, and how little of it 8 bits make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import Bench, held, judged, on, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid, fit_range, grouped
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Truncate(Transform):
    """The stand-in: every weight goes to the grid point below it."""

    acts_on = (Linear, Conv)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        scale, zero = fit_range(weight, level)
        codes = (grouped(weight, level) / scale[..., None]).floor().add(zero[..., None]).clamp(0, 2**level.bits - 1)
        plain = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]].to(torch.uint8)
        return Change(hold={site.tensors["weight"]: Grouped.of(site.shape, level, plain, scale, zero)})

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)


def _noise(bench: Bench, transform: Transform) -> Verdict:
    """Signal and error energy of all matrices of the blocks at 4 to 8 bits, against scale^2 / 12."""
    numbers: dict[str, Measurement] = {}
    ratios, decibels = [], []
    for bits in range(4, 9):
        level = Grid(bits, 64)
        signal = error = expected = 0.0
        count = 0
        for name, form in held(bench, transform, level).items():
            assert isinstance(form, Grouped)
            weight = bench.source.read(name).double().reshape(form.matrix)
            signal += float(weight.square().sum())
            error += float((form.dense().double().reshape(form.matrix) - weight).square().sum())
            step = form.scales.double().repeat_interleave(level.width(form.matrix[1]), 1)[:, : form.matrix[1]]
            expected += float((step.square() / 12).sum())
            count += weight.numel()
        ratios.append(error / expected)
        decibels.append(10 * math.log10(signal / error))
        numbers[f"{bits} bits: squared error over scale^2 / 12"] = Measurement(ratios[-1], "", count)
        numbers[f"{bits} bits: signal to noise"] = Measurement(decibels[-1], "dB", count)
    slope = (decibels[-1] - decibels[0]) / 4
    numbers["gain a bit"] = Measurement(slope, "dB", 4)
    wrong = [
        f"at {bits} bits the squared error is {ratio:.3f} times scale^2 / 12"
        for bits, ratio in zip(range(4, 9), ratios, strict=True)
        if abs(ratio - 1) > 0.05
    ]
    # (2^(b+1) - 1) / (2^b - 1) steps: a little over 6.02 dB at few bits
    exact = 20 * math.log10(255 / 15) / 4
    if abs(slope - exact) > 0.1:
        wrong.append(f"a bit gains {slope:.2f} dB where {exact:.2f} are expected")
    return judged(wrong, numbers)


def _lossless(bench: Bench, transform: Transform) -> Verdict:
    found = seen(bench, transform, Grid(8, None))
    n = bench.certify.inputs.shape[0]
    # of a classifier the losses are shares of right answers
    numbers = {
        "same first choice as the original": Measurement(found.agreement, "", n),
        "accuracy": Measurement(found.loss, "", n),
        "accuracy of the original": Measurement(found.original, "", n),
        "KL": Measurement(found.kl, "nats/image", n),
        "bytes": Measurement(float(found.bytes), "bytes", 1),
    }
    wrong = [] if found.original - found.loss <= 0.005 else [f"accuracy falls by {found.original - found.loss:.2%}"]
    if found.agreement < 0.992:
        wrong.append(f"only {found.agreement:.2%} of the first choices stay")
    return judged(wrong, numbers)


def _nearest(bench: Bench, transform: Transform) -> Verdict:
    """Against truncation on the same grid."""
    wrong, numbers = [], {}
    for bits in (8, 6, 4):
        ours = seen(bench, transform, Grid(bits, 64))
        below = seen(bench, Truncate(), Grid(bits, 64))
        numbers[f"{bits} bits: KL, nearest"] = spread([ours.kl], "nats/token")
        numbers[f"{bits} bits: KL, truncated"] = spread([below.kl], "nats/token")
        numbers[f"{bits} bits: perplexity gap, nearest"] = spread([ours.gap], "share")
        if not ours.kl < below.kl:
            wrong.append(f"at {bits} bits KL is not below that of truncation")
    if numbers["8 bits: perplexity gap, nearest"].value > 0.005:
        wrong.append("8 bits raise the perplexity by over 0.5 %")
    return judged(wrong, numbers)


def _on(name: str, check: str, transform: Transform, lab: Lab) -> Verdict:
    checks = {"noise": _noise, "lossless": _lossless, "nearest": _nearest}
    return on(lab, name, lambda bench: checks[check](bench, transform))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Rounding to nearest makes uniform noise: squared error scale^2 / 12 within 5 %, and 6 dB more signal to noise with each bit.",
        where=Paper("Bennett", 1948, "10.1002/j.1538-7305.1948.tb01340.x"),
        scale="nano, all matrices of the blocks, 4 to 8 bits in groups of 64; no chance in it",
        check=partial(_on, "nano", "noise", RTN()),
        broken=partial(_on, "nano", "noise", Truncate()),
    ),
    Claim(
        says="On one grid the nearest point is better than the one below, and 8 bits raise the perplexity by at most 0.5 %.",
        where=Paper("Jacob et al.", 2018, "arXiv:1712.05877", "section 2.1"),
        scale="nano, all matrices of the blocks, 8, 6 and 4 bits in groups of 64; no chance in it",
        check=partial(_on, "nano", "nearest", RTN()),
        broken=partial(_on, "nano", "nearest", Truncate()),
    ),
    Claim(
        says="8-bit weights keep a residual network's accuracy within half a point, and 99.2 % of its first choices.",
        where=Paper("Jacob et al.", 2018, "arXiv:1712.05877", "section 4.1.1"),
        scale="ResNet-20 on CIFAR-10 test images, all layers, one scale a channel; no chance in it",
        check=partial(_on, "resnet20", "lossless", RTN()),
        broken=partial(_on, "resnet20", "lossless", Truncate()),
    ),
)
