"""CHESS: neurons of a gated feed-forward layer, and inputs of attention's projections, that are small for a token are left out for it.

He et al. 2024, arXiv:2409.01366, sections 3.2 (channel-wise thresholds, eq. 7 to 9) and 3.3 (selective sparsification).  For x (t, d) and
a = act(W_gate x), u = W_up x (t, h), a neuron matters to a token by |a_i| E|u_i|, E the mean over calibration tokens, which is known before
u is. T: the `share` quantile of all of these in a layer; tau_i = T / E|u_i|; y = W_down (a * u) over the i with |a_i| >= tau_i, so rows of
W_up and columns of W_down are read for these alone. Of the `projections` of attention (q and o, whose error hurts least) those inputs are
left out that are below the `attention` quantile of |x|, one for each projection; k and v stay dense. Nothing is trained. `channels=False`:
one threshold on |a| for all neurons of a layer, which is CATS (Lee et al. 2024, arXiv:2404.08763).
Bytes stay; multiplications and bytes read fall for tokens that come one at a time.  Sibling: route.gate.factorllm (learned experts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.part import adopt
from laconic.core.router import Routed, Router, Skips
from laconic.core.site import Anatomy, Linear, Site, Sublayer
from laconic.core.transform import Change, Lesson
from laconic.kernels.skipping import lined, skipped

CARD = Card(Paper("He et al.", 2024, "arXiv:2409.01366", "sections 3.2 and 3.3"), catalogue="chess", sibling="route.gate.factorllm")

MOST = torch.finfo(torch.bfloat16).max


def tallied(values: Tensor) -> Tensor:
    """How many of some numbers >= 0 there are of each bf16 number -> (2^15,), by the number's bits."""
    return torch.bincount(values.flatten().bfloat16().view(torch.int16).long(), minlength=1 << 15)


def quantile(tally: Tensor, share: float) -> float:
    """The number below which `share` of those in a tally lie, to the 1/256 that bf16 holds."""
    reached = tally.cumsum(0)
    at = int(torch.searchsorted(reached, torch.tensor(share * float(reached[-1]))))
    return float(torch.tensor(at, dtype=torch.int16).view(torch.bfloat16))


def thresholds(least: float, mean: Tensor) -> Tensor:
    """least, mean (h,) -> least / mean, such as bf16 holds; what is always nothing (a mean of 0) need never run."""
    found = torch.where(mean > 0, least / mean, MOST if least > 0 else 0.0)
    return found.clamp(max=MOST).bfloat16().float()


@dataclass(frozen=True)
class CHESS(Router):
    """share: of the neurons, attention: of the inputs of `projections`, that are left out on calibration data; channels: a threshold for
    each neuron."""

    acts_on = (Sublayer,)
    learns: ClassVar[Literal["parts", "model"]] = "parts"
    share: float = 0.5
    attention: float = 0.5
    projections: str = "qo"
    channels: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or not 0 <= self.attention < 1 or not self.share + self.attention:
            raise ValueError(f"share={self.share} and attention={self.attention}: shares of at least 0, below 1, not both 0")
        if not set(self.projections) <= set("qkvo"):
            raise ValueError(f"projections={self.projections!r}: some of the letters q, k, v and o")

    @property
    def lesson(self) -> Lesson | None:
        return None

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        if site.roles.get("part") != "mlp":
            found = [
                s for s in anatomy.sites(Linear) if s.context.get("layer") == site.context["layer"] and s.roles["part"] in self.projections
            ]
            return Change(place={s.name: Inputs(s.shape[1], self.attention) for s in found if self.attention and not s.transposed})
        if not self.share:
            return Change()
        inside = {s.roles["part"]: s for s in anatomy.sites(Linear) if s.name.startswith(f"{site.name}.")}
        if set(inside) != {"gate", "up", "down"} or any(s.transposed for s in inside.values()):
            return Change(notes=(f"{site.name} is no plain gated feed-forward layer and stays as it is",))
        names = {part: s.name.removeprefix(f"{site.name}.") for part, s in inside.items()}
        return Change(place={site.name: Neurons(inside["down"].shape[1], self.share, self.channels, names)})


class Sparse(Routed):
    """What leaves out for a token that comes alone what is below its threshold."""

    alone: ClassVar[bool] = True

    def __init__(self, many: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.threshold = nn.Parameter(torch.empty(many, device="meta"), requires_grad=False)
        self._tally: Tensor | None = None

    def begin(self, generator: torch.Generator) -> None:
        # everything runs until something else is seen
        self.threshold = nn.Parameter(torch.zeros(self.threshold.shape), requires_grad=False)

    def _note(self, values: Tensor) -> None:
        self._tally = tallied(values) if self._tally is None else self._tally + tallied(values)

    def _set(self, value: Tensor) -> None:
        self.threshold, self._tally = nn.Parameter(value, requires_grad=False), None

    def _least(self) -> Tensor:
        return torch.zeros_like(self.threshold) if self.asks == "all" else self.threshold

    def _kept(self, a: Tensor) -> Tensor:
        return a.abs() >= self._least().to(a.dtype)

    def _skips(self, rows: int) -> bool:
        """Whether what is left out is not read either."""
        return rows == 1 and self.run == "gathered" and self.asks == "router"


def in_lines(module: nn.Module) -> Tensor:
    """The weight of a module (n, m), from now on with its columns in lines."""
    weight: Any = module.weight
    with torch.inference_mode(False):
        weight.data = lined(weight.data)
    return weight  # type: ignore[no-any-return]


class Neurons(Sparse):
    """The feed-forward layer. names: of its gate, up and down below it."""

    part = "prune.activation.chess.Neurons"
    looks: ClassVar[int] = 2

    def __init__(self, width: int, share: float, channels: bool, names: Mapping[str, str]) -> None:
        super().__init__(width, share)
        self.channels, self.names = channels, dict(names)
        # not a submodule: its own ones are this part's, under their names
        self._act: tuple[nn.Module, ...] = ()
        self._mean: Tensor | None = None
        self._tokens = self._looks = 0

    def around(self, path: str, model: nn.Module) -> None:
        layer = model.get_submodule(path)
        adopt(self, layer)
        self._act = (act_of(layer, self.names),)

    def fits(self, path: str, model: nn.Module) -> bool:
        return is_gated(model.get_submodule(path), self.names)

    def begin(self, generator: torch.Generator) -> None:
        super().begin(generator)
        self._mean, self._tokens, self._looks = None, 0, 0

    def looked(self) -> None:
        self._looks += 1
        if self._looks == 1 and self._mean is not None:
            self._mean /= max(self._tokens, 1)
        elif self._tally is not None and self._mean is not None:
            self._set(thresholds(quantile(self._tally, self.share), self._mean if self.channels else torch.ones_like(self._mean)))

    def _look(self, a: Tensor, u: Tensor) -> None:
        if self._looks == 0:
            loud = u.abs().float().sum(0)
            self._mean, self._tokens = loud if self._mean is None else self._mean + loud, self._tokens + len(u)
        elif self._mean is not None:
            self._note(a.abs().float() * (self._mean if self.channels else 1.0))

    def _modules_named(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        gate, up, down = (self.get_submodule(self.names[part]) for part in ("gate", "up", "down"))
        return gate, up, down

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up, down = self._modules_named()
        down_weight: Any = down.weight
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        a = self._act[0](gate(x))
        kept = self._kept(a)
        t, h, (d, n) = len(x), a.shape[1], (x.shape[1], int(down_weight.shape[0]))
        self.count(t, t * h * (2 * d + n), t * h * d + float(kept.sum()) * (d + n), t * h * (2 * d + n))
        if self._skips(t):
            bias: Any = down.bias
            y = skipped(a * kept, in_lines(down), x, up.weight, up.bias).to(x.dtype)  # type: ignore[arg-type]
            y = y if bias is None else y + bias
        else:
            u = up(x)
            if self.run == "looking":
                self._look(a, u)
            y = down(a * u * kept)
        return y.reshape(*hidden_states.shape[:-1], n)

    def skips(self) -> Skips | None:
        gate, up, down = self._modules_named()
        if not type(self._act[0]).__name__.startswith("SiLU") or up.bias is not None or down.bias is not None:
            return None
        return Skips(self._least(), in_lines(down), up.weight, gate)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        sizes = {"width": self.threshold.numel(), "share": self.share, "channels": self.channels}
        return {"part": self.part, **sizes, "names": self.names}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["width"], described["share"], described["channels"], described["names"])


def act_of(layer: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """The one child of a layer that is none of those named; ValueError where there is not just one."""
    (act,) = [child for name, child in layer.named_children() if name not in names.values()]
    return act


def is_gated(layer: nn.Module, names: Mapping[str, str]) -> bool:
    """Whether a layer is down(act(gate(x)) * up(x)), tried on one input; names: of its gate, up and down below it."""
    try:
        act = act_of(layer, names)
        gate, up, down = (layer.get_submodule(names[part]) for part in ("gate", "up", "down"))
    except (AttributeError, ValueError):
        return False
    if not all(isinstance(one, nn.Linear) for one in (gate, up, down)):
        return False
    weight: Any = gate.weight
    x = weight.new_ones(1, weight.shape[1])
    made, wanted = down(act(gate(x)) * up(x)), layer(x)
    return wanted.shape == made.shape and (x.is_meta or torch.allclose(made, wanted, rtol=1e-2, atol=1e-4))


class Inputs(Sparse):
    """A projection of attention, with one threshold for all of its inputs."""

    part = "prune.activation.chess.Inputs"
    looks: ClassVar[int] = 1

    def __init__(self, width: int, share: float) -> None:
        super().__init__(1, share)
        self.width = width
        self.out_features = 0

    def around(self, path: str, model: nn.Module) -> None:
        linear: Any = model.get_submodule(path)
        for leaf in ("weight", "bias"):
            self.register_parameter(leaf, getattr(linear, leaf))
        self.out_features = linear.out_features

    def fits(self, path: str, model: nn.Module) -> bool:
        return type(model.get_submodule(path)) is nn.Linear

    def looked(self) -> None:
        if self._tally is not None:
            self._set(torch.tensor([quantile(self._tally, self.share)]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.width)
        kept = self._kept(flat)
        t, n = len(flat), self.out_features
        self.count(t, t * n * self.width, n * float(kept.sum()), t * n * self.width)
        bias: Any = self.bias
        if self._skips(t):
            y = skipped(flat * kept, in_lines(self)).to(x.dtype)
            y = y if bias is None else y + bias
        else:
            if self.run == "looking":
                self._note(flat.abs())
            y = F.linear(flat * kept, self.weight, bias)  # type: ignore[arg-type]
        return y.reshape(*x.shape[:-1], n)

    def skips(self) -> Skips | None:
        return None if self.bias is not None else Skips(self._least(), in_lines(self))

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "width": self.width, "share": self.share}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["width"], described["share"])
