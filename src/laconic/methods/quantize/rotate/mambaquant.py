"""MambaQuant: rotations and scales that give the channels of a Mamba equal variance before they are rounded; none changes what it computes.

Xu et al. 2025, arXiv:2501.13484. Offline (section 4.1), along the residual stream and the low rank that steps are made from: x becomes x R,
R = V H, where V L V^T is the second moment of calibration activations (Karhunen-Loeve) and H a normalised Hadamard matrix, so that every
channel of x R has the second moment sum_i L_i H_ij^2 = trace / n; the tensors on both sides take R in. Online (section 4.2), at the output
projection and at the product of states and C in the scan, where no weight can take a rotation in: factors s_j = sqrt(max |x_j| / max |w_j|)
(SmoothQuant), x / s and w s, go into the gate, as z sigmoid(s z), and into the projections of B and C; then H is applied as the model runs
(at the output projection by quantize.rotate.hadamard, which a recipe's choices name, as they name what rounds weights and inputs).
The baselines are its knobs: basis="hadamard", smooth=False is QuaRot's rotation; basis="none", smooth=False rounds what is there.
Streams whose norm takes the mean away, and tied heads, allow no such rotation and stay. Factors of the gate are bf16, as stored.
Sibling: quantize.rotate.hadamard (at one matrix, without data)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.part import Part
from laconic.core.site import Edge, Gated, Member, Rotate, Site
from laconic.core.statistic import Gram, Peaks, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched, Turned
from laconic.kernels.hadamard import hadamard
from laconic.methods.quantize.rotate.mixer import Mixer

CARD = Card(Paper("Xu et al.", 2025, "arXiv:2501.13484", "section 4"), catalogue="mambaquant", sibling="quantize.rotate.hadamard")


def klt_rotation(moment: Tensor) -> Tensor:
    """moment (n, n) = mean of x xT -> R = V H (n, n), fp64: every channel of x R has the second moment trace / n. Eq. 8 and 9."""
    _, basis = torch.linalg.eigh(moment.double())
    # an eigenvector has two signs: the one whose largest entry is positive
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return hadamard(basis * largest.sign())


def smoothing(inputs: Tensor, weights: Tensor) -> Tensor:
    """Largest sizes (n,) of two operands by channel -> s (n,) in bf16: dividing one by it and multiplying the other makes both as large.
    1 where either is dead."""
    live = (inputs > 0) & (weights > 0)
    factors = torch.where(live, inputs / weights.clamp(min=1e-30), torch.ones_like(inputs)).sqrt()
    return factors.clamp(1e-4, 1e4).to(torch.bfloat16).float()


def unscaled(moment: Tensor, scale: Tensor) -> Tensor:
    """The second moment (n, n) of x, given that of x * scale (n,). Channels of next to no scale have left nothing to see."""
    inverse = torch.where(scale.abs() > 1e-4 * scale.abs().max(), 1 / scale, torch.zeros_like(scale)).double()
    return moment.double() * inverse[:, None] * inverse


@dataclass(frozen=True)
class MambaQuant(Align):
    """basis: of rotations. smooth: before online ones. scan: bits of the scan's operands."""

    basis: Literal["klt", "hadamard", "none"] = "klt"
    smooth: bool = True
    scan: int | None = 8

    def __post_init__(self) -> None:
        if self.basis not in ("klt", "hadamard", "none"):
            raise ValueError(f"basis={self.basis!r}: it is 'klt', 'hadamard' or 'none'")
        if self.scan is not None and not 2 <= self.scan <= 8:
            raise ValueError(f"scan={self.scan}: operands have 2 to 8 bits, or None")

    def opens(self, edge: Edge) -> Mapping[str, Part]:
        if (act := edge.may(Gated)) is None:
            return {}
        return {act.module: Mixer(scaled=self.smooth, turned=self.basis != "none", bits=self.scan)}

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        if self.basis == "klt" and _turns(edge):
            return tuple((member.site, Gram()) for member in _within(edge))
        if self.smooth and edge.may(Gated) is not None:
            return tuple((member.site, Peaks()) for member in edge.readers)
        return tuple((site, Peaks()) for site in edge.operands) if self.smooth else ()

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        if self.basis != "none" and _turns(edge):
            if self.basis == "hadamard":
                return Change(move=((edge, Turned(hadamard(torch.eye(edge.width, dtype=torch.float64)))),))
            return Change(move=((edge, Turned(klt_rotation(self._moment(edge, read, stats)))),))
        if self.basis != "none" and edge.folds and edge.writers and edge.may(Rotate) is None:
            return Change(notes=(f"{edge.name} is not turned: a norm's scale on it can go into no reader (under a tied head, say)",))
        if self.smooth and edge.may(Gated) is not None:
            (reader,) = edge.readers
            factors = smoothing(stats[reader.site.name][Peaks()], read(reader.site).abs().amax(0))
            return Change(move=((edge, Stretched(1 / factors)),))
        if self.smooth and edge.operands:
            state, readout = (stats[site.name][Peaks()] for site in edge.operands)
            return Change(move=((edge, Stretched(1 / smoothing(state, readout))),))
        return Change()

    def _moment(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Tensor:
        """Of what flows along the edge, the mean over its readers in the layers, each seen behind its own norm."""
        total = torch.zeros(edge.width, edge.width, dtype=torch.float64)
        readers = _within(edge)
        for member in readers:
            moment = stats[member.site.name][Gram()].double()
            for fold in edge.folds:
                if any(reader.site.name == member.site.name for reader in fold.readers):
                    moment = unscaled(moment, read(fold.norm) + fold.norm.context["plus"])
            total += moment / len(readers)
        return total


def _turns(edge: Edge) -> bool:
    """Whether a matrix over the whole width may turn what flows here."""
    act = edge.may(Rotate)
    return act is not None and not act.keeps_ones and edge.block == edge.width and bool(_within(edge))


def _within(edge: Edge) -> tuple[Member, ...]:
    """Readers that lie in the layers; the head sees what the last of them left."""
    return tuple(member for member in edge.readers if "layer" in member.site.context)
