"""FactorLLM: a trained feed-forward layer cut into N equal experts, of which a learned router runs k for each token.

Zhao et al. 2024, arXiv:2408.11855, section 3.  The hidden neurons are split in order into N runs E_1 .. E_N: rows of gate and up,
columns of down. So e_i(x) = W_down[:, E_i] (act(W_gate[E_i] x) * (W_up[E_i] x)) and sum_i e_i(x) = FFN(x), to rounding. Here
y(x) = s sum_{i in top-k of R x} e_i(x) for a router R (N, d), s = N/k; k = N is the layer as it was. Learned on little text, R and experts:
KL to the original at the output + weight * CE(softmax(R x), label), a mean over tokens, summed over layers (Prior-Approximate Router): the
teacher is the frozen layer at the same x, the error of an expert mean_d (e_i(x) - FFN(x) / s)^2, the label 1/k for each of the k of least
error. Gradients of the KL reach R straight through. `plain`: s = 1, which after little learning is far nearer to the original.
x (..., d). Bytes stay, multiplications fall; expected = worst, k of N for each token. The layer may be gated or not; one whose forward has
a width written into it is left.  Sibling: route.gate.ftwt (filters of images)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.errors import UserError
from laconic.core.part import adopt
from laconic.core.router import Routed, Router
from laconic.core.site import Anatomy, Linear, Site, Sublayer
from laconic.core.transform import Change, Lesson
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Zhao et al.", 2024, "arXiv:2408.11855", "section 3"), catalogue="factorllm", sibling="route.gate.ftwt")

# a tensor of the layer by its name below it, the stored axis that is cut, and its indices for each expert
Cut = tuple[str, int, tuple[tuple[int, ...], ...]]


def chosen(scores: Tensor, k: int) -> Tensor:
    """scores (..., N) -> (..., N) fp, 1 at the k largest."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, -1).indices, 1.0)


def prior(experts: Tensor, teacher: Tensor, k: int, scale: float) -> Tensor:
    """experts (N, t, d), teacher (t, d): outputs at the same inputs -> (t, N), 1 at the k experts nearest to teacher / scale."""
    error = (experts - teacher / scale).square().mean(-1).T
    return chosen(-error, k)


def imitation(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the router's softmax over N against a label (t, N) of ones, all equally likely, in nats a token."""
    return -(label / label.sum(-1, keepdim=True) * logits.log_softmax(-1)).sum(-1).mean()


@dataclass(frozen=True)
class FactorLLM(Router):
    """experts, active: N and k; weight: of the router's loss; rate, router_rate: of experts and routers, Adam, falling along a cosine;
    batch: texts a step; plain: experts are parts of a sum, not each the whole times k/N."""

    acts_on = (Sublayer,)
    learns: ClassVar[Literal["parts", "model"]] = "parts"
    experts: int = 4
    active: int = 2
    weight: float = 0.05
    rate: float = 5e-4
    router_rate: float = 2e-3
    steps: int = 128
    batch: int = 4
    plain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"active={self.active} of experts={self.experts}: at least one, at most all")
        if self.steps < 1 or self.batch < 1 or self.weight < 0:
            raise ValueError(f"steps={self.steps}, batch={self.batch} must be at least 1, weight={self.weight} at least 0")

    @property
    def lesson(self) -> Lesson:
        rates = (("weight", self.rate), ("router", self.router_rate))
        return Lesson(Divergence(), rates=rates, steps=self.steps, batch=self.batch, decay="cosine")

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        if site.roles.get("part") != "mlp":
            return Change()
        (writer, *more) = [s for s in anatomy.sites(Linear) if s.name in site.context["writers"]]
        if more:
            return Change(notes=(f"{site.name} has experts already and stays as it is",))
        group = anatomy.coupled(writer, 1)
        if group.width % self.experts:
            raise UserError(
                f"experts={self.experts} do not divide the {group.width} hidden neurons of {site.name}; take a number that does"
            )
        size = group.width // self.experts
        runs = [range(e * size, (e + 1) * size) for e in range(self.experts)]
        members = sorted(group.members, key=lambda m: m.reads)
        cuts = [(m.site.name.removeprefix(f"{site.name}."), m.stored_axis, tuple(tuple(m.slices(run)) for run in runs)) for m in members]
        scale = 1.0 if self.plain else self.experts / self.active
        return Change(place={site.name: Experts(writer.shape[0], self.active, self.weight, scale, cuts)})


class Experts(Routed):
    """The layer in N parts. cuts: layers of linears by name below it, the last one the writer; shared biases of that are added once."""

    part = "route.gate.factorllm.Experts"

    def __init__(self, width: int, active: int, weight: float, scale: float, cuts: Sequence[Cut]) -> None:
        super().__init__()
        self.active, self.weight, self.scale, self.cuts = active, weight, scale, tuple(cuts)
        self.experts = len(self.cuts[0][2])
        self.router = nn.Parameter(torch.empty(self.experts, width, device="meta"), requires_grad=False)
        self.teacher: dict[str, Tensor] | None = None
        # not a submodule: its own ones are this part's, under their names
        self._layer: tuple[nn.Module, ...] = ()

    def around(self, path: str, model: nn.Module) -> None:
        layer = model.get_submodule(path)
        self._layer = (layer,)
        adopt(self, layer)

    def fits(self, path: str, model: nn.Module) -> bool:
        layer = model.get_submodule(path)
        self._layer = (layer,)
        weight: Tensor = layer.get_submodule(self.cuts[0][0]).weight  # type: ignore[assignment]
        try:
            return self.expert(0, weight.new_zeros(1, self.router.shape[1])).shape == (1, self.router.shape[1])
        except (RuntimeError, TypeError, ValueError):
            return False

    def begin(self, generator: torch.Generator) -> None:
        self.router = nn.Parameter(torch.randn(self.router.shape, generator=generator) * self.router.shape[1] ** -0.5)

    def remember(self) -> None:
        self.teacher = {name: value.detach().clone() for name, value in self._layer[0].named_parameters()}

    def penalty(self, done: float) -> Tensor | None:
        return None if self.error is None or self.weight == 0 else self.weight * self.error

    def _shared(self) -> Tensor | None:
        """The writer's bias, which is no expert's own."""
        return getattr(self._layer[0].get_submodule(self.cuts[-1][0]), "bias", None)

    def logits(self, x: Tensor) -> Tensor:
        """x (t, d) -> (t, N), what the router thinks of each expert."""
        return F.linear(x, self.router)

    def expert(self, i: int, x: Tensor) -> Tensor:
        """e_i(x): the layer's own forward over its share of each weight."""
        tensors: dict[str, Tensor] = {}
        for name, axis, indices in self.cuts:
            index = indices[i]
            run = index[-1] - index[0] + 1 == len(index)
            for leaf, at in (("weight", axis), ("bias", 0)):
                value: Tensor | None = getattr(self._layer[0].get_submodule(name), leaf, None)
                if value is None:
                    continue
                writes = name == self.cuts[-1][0]
                if leaf == "bias" and writes:
                    tensors[f"{name}.{leaf}"] = torch.zeros_like(value)
                elif run:
                    # a view, not a copy
                    tensors[f"{name}.{leaf}"] = value.narrow(at, index[0], len(index))
                else:
                    tensors[f"{name}.{leaf}"] = value.index_select(at, torch.tensor(index, device=value.device))
        return functional_call(self._layer[0], tensors, (x,))  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.logits(x)
        total = sum(self._layer[0].get_submodule(name).weight.numel() for name, _, _ in self.cuts)  # type: ignore[union-attr, operator, misc]
        taken = self.experts if self.asks == "all" else self.active
        spent = x.shape[0] * (total * taken / self.experts + self.router.numel())
        self.count(x.shape[0], x.shape[0] * total, spent, spent)
        if self.asks == "all":
            y: Tensor = self._layer[0](x)
        elif self.run == "gathered" and self.asks == "router":
            y = self._gathered(x, chosen(logits, self.active))
        else:
            y = self._masked(x, logits)
        return y.reshape(hidden_states.shape)

    def _scaled(self, y: Tensor) -> Tensor:
        y = y * self.scale
        return y if (shared := self._shared()) is None else y + shared

    def _gathered(self, x: Tensor, mask: Tensor) -> Tensor:
        """Each expert over the tokens that are routed to it."""
        y = torch.zeros_like(x)
        for i in range(self.experts):
            if (rows := mask[:, i].nonzero()[:, 0]).numel():
                y.index_add_(0, rows, self.expert(i, x[rows]))
        return self._scaled(y)

    def label(self, outs: Tensor, x: Tensor) -> Tensor:
        """outs (N, t, d) of the experts at x (t, d) -> the k that the router is to name, by the layer as it was when it was remembered."""
        layer, shared = self._layer[0], self._shared()
        whole: Tensor = layer(x) if self.teacher is None else functional_call(layer, self.teacher, (x,))
        return prior(outs, whole if shared is None else whole - shared, self.active, self.scale)

    def _masked(self, x: Tensor, logits: Tensor) -> Tensor:
        outs = torch.stack([self.expert(i, x) for i in range(self.experts)])
        mask = chosen(logits, self.active)
        if self.run == "learning" or self.asks == "labels":
            with torch.no_grad():
                label = self.label(outs, x)
            self.error = imitation(logits, label)
            mask = label if self.asks == "labels" else mask
        if self.run == "learning":
            soft = logits.softmax(-1)
            mask = mask + soft - soft.detach()
        return self._scaled((outs * mask.T[..., None]).sum(0))

    def describe(self) -> dict[str, Any]:
        runs = [[name, axis, [_runs(index) for index in indices]] for name, axis, indices in self.cuts]
        return {
            "part": self.part,
            "width": self.router.shape[1],
            "active": self.active,
            "weight": self.weight,
            "scale": self.scale,
            "cuts": runs,
        }

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        cuts = [
            (name, axis, tuple(tuple(j for start, stop in runs for j in range(start, stop)) for runs in experts))
            for name, axis, experts in described["cuts"]
        ]
        return cls(described["width"], described["active"], described["weight"], described["scale"], cuts)


def _runs(index: Sequence[int]) -> list[list[int]]:
    """Ascending indices as [start, stop) runs."""
    found: list[list[int]] = []
    for j in index:
        if found and found[-1][1] == j:
            found[-1][1] = j + 1
        else:
            found.append([j, j + 1])
    return found
