"""Spark Transformer's feed-forward layer: the first inputs of a token say which neurons run, and only these read the rest.

You et al. 2025, arXiv:2506.06644 (Spark FFN and statistical top-k).  For x (t, d) = [x1 (t, r), x2 (t, d - r)]:
    s = K1 x1,   a = act(Top_k(s)) * (K2 x2),   y = V a,   Top_k(s) = max(s - theta, 0),   theta = mean(s) + std(s) Phi^-1(1 - k / n)
over the n neurons of a token: no sorting, differentiable almost everywhere, about k that are not 0 where s is near Gaussian.  k / n is
`keep` and r / d is `predictor`; K1 are the first columns of a gated layer's gate, K2 the last of its up, V its down: other columns are
stored under the model's names and not used, so two thirds of the layer's numbers are.  Attention, of which the paper does the same, stays.
The paper trains from scratch with nothing added to the loss (`rehearse=0`); over a trained model all weights learn against the original's
predictions, and K1 x1 is asked besides to come near what the whole gate said at first, with the weight `rehearse`.
Bytes stay; multiplications and bytes read fall for tokens that come alone.  Sibling: prune.activation.chess (nothing is trained)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.part import adopt
from laconic.core.router import Routed, Router
from laconic.core.site import Anatomy, Linear, Site, Sublayer
from laconic.core.transform import Change, Lesson
from laconic.kernels.losses import Divergence
from laconic.kernels.skipping import skipped
from laconic.methods.prune.activation.chess import act_of, in_lines, is_gated

CARD = Card(Paper("You et al.", 2025, "arXiv:2506.06644"), catalogue="spark-transformer", sibling="prune.activation.chess")


def statistical_top(scores: Tensor, keep: float) -> Tensor:
    """scores (..., n) -> max(scores - theta, 0): about keep n of each row are not 0; all but the least where keep is 1."""
    if keep >= 1:
        return scores - scores.amin(-1, keepdim=True)
    # sums of thousands of numbers, in fp32
    spread, mean = torch.std_mean(scores.float(), -1, correction=0, keepdim=True)
    return F.relu(scores - (mean + spread * NormalDist().inv_cdf(1 - keep)).to(scores.dtype))


def exact_top(scores: Tensor, keep: float) -> Tensor:
    """The same with the (k + 1)-th greatest for theta: the k greatest of each row, k = keep n, at least one; all but the least at most."""
    k = min(max(1, round(keep * scores.shape[-1])), scores.shape[-1] - 1)
    return F.relu(scores - scores.topk(k + 1, -1).values[..., -1:])


@dataclass(frozen=True)
class Spark(Router):
    """keep: the share of neurons that run for a token; predictor: the share of inputs that say which; rehearse: the weight of what the gate
    said before; steps of `batch` rows at `rate` for all weights."""

    acts_on = (Sublayer,)
    learns: ClassVar[Literal["parts", "model"]] = "model"
    keep: float = 0.08
    predictor: float = 0.5
    rehearse: float = 1.0
    rate: float = 1e-3
    steps: int = 256
    batch: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.predictor < 1:
            raise ValueError(f"keep={self.keep}: a share above 0, at most 1; predictor={self.predictor}: one between 0 and 1")
        if self.steps < 1 or self.batch < 1 or self.rehearse < 0:
            raise ValueError(f"steps={self.steps}, batch={self.batch}: at least 1; rehearse={self.rehearse}: at least 0")

    @property
    def lesson(self) -> Lesson:
        return Lesson(Divergence(), rates=(("weight", self.rate), ("bias", self.rate)), steps=self.steps, batch=self.batch, decay="cosine")

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        if site.roles.get("part") != "mlp":
            return Change()
        inside = {s.roles["part"]: s for s in anatomy.sites(Linear) if s.name.startswith(f"{site.name}.")}
        if set(inside) != {"gate", "up", "down"} or any(s.transposed for s in inside.values()):
            return Change(notes=(f"{site.name} is no plain gated feed-forward layer and stays as it is",))
        names = {part: s.name.removeprefix(f"{site.name}.") for part, s in inside.items()}
        return Change(place={site.name: Sparks(self.keep, self.predictor, self.rehearse, names)})


class Sparks(Routed):
    """The feed-forward layer. names: of its gate, up and down below it. `labels` are the neurons of an exact top-k."""

    part = "prune.activation.spark.Sparks"
    alone: ClassVar[bool] = True

    def __init__(self, keep: float, predictor: float, rehearse: float, names: Mapping[str, str]) -> None:
        super().__init__()
        self.keep, self.predictor, self.rehearse, self.names = keep, predictor, rehearse, dict(names)
        # not submodules and not stored: the act is this part's own child, the gate is what it was before it learned
        self._act: tuple[nn.Module, ...] = ()
        self._said: tuple[Tensor, Tensor | None] | None = None

    def around(self, path: str, model: nn.Module) -> None:
        layer = model.get_submodule(path)
        adopt(self, layer)
        self._act = (act_of(layer, self.names),)

    def fits(self, path: str, model: nn.Module) -> bool:
        return is_gated(model.get_submodule(path), self.names)

    def remember(self) -> None:
        gate: Any = self.get_submodule(self.names["gate"])
        self._said = gate.weight.detach().clone(), None if gate.bias is None else gate.bias.detach().clone()

    def penalty(self, done: float) -> Tensor | None:
        return None if self.error is None else self.error * self.rehearse

    def _miss(self, scores: Tensor, x: Tensor, gate: Any) -> Tensor:
        """Squared distance of the scores from what the whole gate said of x before it learned, as a share of that."""
        weight, bias = self._said if self._said is not None else (gate.weight.detach(), None if gate.bias is None else gate.bias.detach())
        wanted = F.linear(x.detach(), weight, bias)
        return (scores - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(self.names[part]) for part in ("gate", "up", "down"))
        gate_weight: Any = gate.weight
        down_weight: Any = down.weight
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        (t, d), (n, h) = x.shape, down_weight.shape
        dense = t * h * (2 * d + n)
        if self.asks == "all":
            self.count(t, dense, dense, dense)
            return down(self._act[0](gate(x)) * up(x)).reshape(*hidden_states.shape[:-1], n)  # type: ignore[no-any-return]
        r = max(1, min(d - 1, int(self.predictor * d)))
        alone = t == 1 and self.run == "gathered" and self.asks == "router"
        # laid down by columns, the first ones are one run of memory
        first: Any = (in_lines(gate) if alone else gate_weight)[:, :r]
        scores = F.linear(x[:, :r], first, gate.bias)  # type: ignore[arg-type]
        a = self._act[0]((statistical_top if self.asks == "router" else exact_top)(scores, self.keep))
        rest = F.pad(x[:, r:], (r, 0))
        self.count(t, dense, t * h * r + float((a != 0).sum()) * (d + n), t * h * (r + d + n))
        if alone:
            y = skipped(a, in_lines(down), rest, up.weight, up.bias).to(x.dtype)  # type: ignore[arg-type]
            y = y if down.bias is None else y + down.bias  # type: ignore[operator]
        else:
            if self.run == "learning":
                self.error = self._miss(scores, x, gate)
            y = down(a * up(rest))
        return y.reshape(*hidden_states.shape[:-1], n)

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "keep": self.keep, "predictor": self.predictor, "rehearse": self.rehearse, "names": self.names}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["keep"], described["predictor"], described["rehearse"], described["names"])
