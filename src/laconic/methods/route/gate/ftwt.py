"""FTWT, Fire Together Wire Together: which filters of a convolution an image needs is predicted from the convolution's input.

Elkerdawy et al. 2022, arXiv:2110.08232, section 3.  For input x (b, m, h, w) and y (b, n, h', w') = norm(conv(x)):
predicted: p = sigmoid(H m softmax(mean of x over h, w) + c), one 1x1 convolution H (n, m); filter i runs where p_i > 0.5, else y_i = 0.
label: a_i = max over h', w' of |y_i| (of what is positive, where a rectifier follows), over their sum and sorted; the smallest set whose
mass reaches `mass` is 1. Learned: KL to the original at the output, by all weights, + BCE(p, label), by the heads (x is detached): a mean
over images, summed over filters and layers. SGD with momentum; the heads stay after half of the steps. `mass` is the one knob: what it will
cost is counted before learning, by running the original with the labels in place of the heads' words.
What runs: the filters that are asked for, over the input channels that are not all zeros.
Convolutions in groups stay as they are.  Sibling: route.gate.factorllm (experts of tokens)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.router import Routed, Router
from laconic.core.site import Anatomy, Conv, Site
from laconic.core.transform import Change, Lesson
from laconic.kernels.blocks import reaching
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Elkerdawy et al.", 2022, "arXiv:2110.08232", "section 3"), catalogue="ftwt", sibling="route.gate.factorllm")


def fired(response: Tensor, mass: float) -> Tensor:
    """response (b, n) >= 0 -> (b, n) of 0 and 1: the fewest filters whose share of the row's sum reaches `mass`; at least one, all of them
    at most those that respond."""
    return reaching(response, mass).to(response.dtype)


def pooled(x: Tensor) -> Tensor:
    """x (b, m, h, w) -> (b, m): softmax over channels of each one's mean, times m, so that one rate of learning fits all widths."""
    return x.mean((2, 3)).softmax(1) * x.shape[1]


def gathered(x: Tensor, conv: Any, live: Tensor, wanted: Tensor) -> Tensor:
    """A convolution of x (b, m, h, w) that computes the `wanted` (b, n) outputs from the `live` (b, m) inputs, those of equal needs
    together; zeros elsewhere."""
    weight: Tensor = conv.weight
    bias: Tensor | None = conv.bias
    y = x.new_zeros(x.shape[0], weight.shape[0], *_spatial(conv, x))
    needs, kind = torch.unique(torch.cat([live, wanted], 1), dim=0, return_inverse=True)
    for number, need in enumerate(needs):
        i, o = need[: live.shape[1]].nonzero()[:, 0], need[live.shape[1] :].nonzero()[:, 0]
        rows = (kind == number).nonzero()[:, 0]
        if i.numel() and o.numel():
            some = None if bias is None else bias[o]
            part = F.conv2d(x[rows][:, i], weight[o][:, i], some, conv.stride, conv.padding, conv.dilation)
            y[rows[:, None], o] = part
        elif o.numel() and bias is not None:
            y[rows[:, None], o] = bias[o][:, None, None]
    return y


def _spatial(conv: Any, x: Tensor) -> tuple[int, ...]:
    sides = zip(x.shape[2:], conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True)
    return tuple((side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, pad, dilation in sides)


@dataclass(frozen=True)
class FTWT(Router):
    """mass: r, the share of a layer's response that what runs must have; steps of `batch` images at least; rate: of all weights; head_rate:
    of the heads, which stay once the share `until` of the steps is done."""

    acts_on = (Conv,)
    learns: ClassVar[Literal["parts", "model"]] = "model"
    mass: float = 0.9
    rate: float = 0.01
    head_rate: float = 0.1
    until: float = 0.5
    steps: int = 320
    batch: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or not 0 < self.until <= 1:
            raise ValueError(f"mass={self.mass} and until={self.until}: shares above 0, at most 1")
        if self.steps < 1 or self.batch < 2:
            raise ValueError(f"steps={self.steps} must be at least 1, batch={self.batch} at least 2: norms take their statistics from it")

    @property
    def lesson(self) -> Lesson:
        rates = (("weight", self.rate), ("bias", self.rate), ("head", self.head_rate), ("offset", self.head_rate))
        return Lesson(Divergence(), rates=rates, steps=self.steps, batch=self.batch, optimiser="momentum", decay="cosine")

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        if len(site.shape) != 4 or site.context.get("groups", 1) != 1 or isinstance(site.context.get("padding"), str):
            return Change(notes=(f"{site.name} is no plain convolution of images and stays as it is",))
        n, m = site.shape[:2]
        norms = site.context.get("norms", ())
        norm = norms[0] if len(norms) == 1 else ""
        return Change(place={site.name: Gated(m, n, self.mass, self.until, norm, bool(site.context.get("rectified")))})


class Gated(Routed):
    """The convolution with its head. norm: the path of the norm behind it, whose output it gates, "" for its own; rectified: only what is
    positive of that counts."""

    part = "route.gate.ftwt.Gated"

    def __init__(self, inner: int, outer: int, mass: float, until: float, norm: str, rectified: bool) -> None:
        super().__init__()
        self.mass, self.until, self.norm, self.rectified = mass, until, norm, rectified
        self.head = nn.Parameter(torch.empty(outer, inner, device="meta"), requires_grad=False)
        self.offset = nn.Parameter(torch.empty(outer, device="meta"), requires_grad=False)
        # of the pass that is under way
        self._logits = self._live = torch.empty(0)

    def fits(self, path: str, model: nn.Module) -> bool:
        conv = model.get_submodule(path)
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros"

    def around(self, path: str, model: nn.Module) -> None:
        conv = model.get_submodule(path)
        for leaf in ("weight", "bias"):
            self.register_parameter(leaf, getattr(conv, leaf))
        for name in ("stride", "padding", "dilation"):
            setattr(self, name, getattr(conv, name))
        if self.norm:
            model.get_submodule(self.norm).register_forward_hook(self._behind)

    def begin(self, generator: torch.Generator) -> None:
        self.head = nn.Parameter(torch.randn(self.head.shape, generator=generator) / self.head.shape[1])
        # all filters run until something else is learned
        self.offset = nn.Parameter(torch.ones(self.offset.shape))

    def penalty(self, done: float) -> Tensor | None:
        return None if self.error is None or done >= self.until else self.error

    def forward(self, x: Tensor) -> Tensor:
        self._logits = F.linear(pooled(x.detach()), self.head, self.offset)
        self._live = x.flatten(2).any(2)
        if self.run == "gathered" and self.asks == "router":
            y = gathered(x, self, self._live, self._logits > 0)
        else:
            conv: Any = self
            y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
        return y if self.norm else self._settled(y)

    def _behind(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._settled(output)

    def label(self, y: Tensor) -> Tensor:
        """y (b, n, h, w), all filters' -> (b, n), 1 for those that the head is to name."""
        return fired((y.relu() if self.rectified else y.abs()).amax((2, 3)), self.mass)

    def _settled(self, y: Tensor) -> Tensor:
        """y (b, n, h, w) behind the norm -> what of it was asked for."""
        logits, live = self._logits, self._live
        mask = torch.ones_like(logits) if self.asks == "all" else (logits > 0).to(y.dtype)
        if self.run == "learning" or self.asks == "labels":
            with torch.no_grad():
                label = self.label(y)
            self.error = F.binary_cross_entropy_with_logits(logits, label, reduction="sum") / len(y)
            mask = label if self.asks == "labels" else mask
        # of one filter over one channel
        each = y.shape[2] * y.shape[3] * self.weight[0, 0].numel()  # type: ignore[index, operator]
        b, dense, head = y.shape[0], each * logits.shape[1] * live.shape[1], self.head.numel()
        spent = dense * b if self.asks == "all" else each * float((mask.sum(1) * live.sum(1)).sum()) + head * b
        self.count(b, dense * b, spent, (dense + head) * b)
        return y * mask[:, :, None, None]

    def describe(self) -> dict[str, Any]:
        n, m = self.head.shape
        sizes = {"inner": m, "outer": n, "mass": self.mass, "until": self.until}
        return {"part": self.part, **sizes, "norm": self.norm, "rectified": self.rectified}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(*(described[key] for key in ("inner", "outer", "mass", "until", "norm", "rectified")))
