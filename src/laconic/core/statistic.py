"""A Statistic is a mergeable running sum: one pass over all tokens = two halves merged = eight machines merged, to rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from laconic.core.site import Site


class Seen(NamedTuple):
    """What passed a site in one batch. Rows are tokens (or positions of a convolution); masked tokens never count.

    x (t, m) input rows in matrix view, or (t,) row indices for a lookup; y (t, n); grad (t, n) gradient of the summed loss with respect
    to y; reference_x (t, m) what the original model would have fed here; mask (t,) true where a token counts; routing (t, k) experts;
    sequences: the rows are those of so many sequences of one length, one after another."""

    x: Tensor | None = None
    y: Tensor | None = None
    grad: Tensor | None = None
    reference_x: Tensor | None = None
    mask: Tensor | None = None
    routing: Tensor | None = None
    sequences: int = 1


class Statistic(ABC):
    """State is a plain tensor or a dict of tensors, so that it can be stored and sent."""

    needs: frozenset[str]

    @abstractmethod
    def init(self, site: Site) -> Any:
        """The empty sum for a site."""

    @abstractmethod
    def update(self, state: Any, seen: Seen) -> Any:
        """The sum with one more batch; may work in place."""

    @abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """The sum of two disjoint passes."""

    @abstractmethod
    def finish(self, state: Any) -> Tensor:
        """The statistic itself; zero tokens give zeros, never NaN. May use the state up."""


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x[mask]


def _add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: a[key] + b[key] for key in a}


@dataclass(frozen=True)
class Gram(Statistic):
    """Mean of x xT over tokens, (m, m) in fp32: the Hessian of a layer's squared output error, up to a factor of 2. Of a convolution with
    groups (g, m, m), one for each group, whose output rows see inputs of their own; x then has the groups of one position side by side.

    From `wide` inputs on only the half on and above the diagonal is summed, `run` rows at a time, and mirrored at the end."""

    needs = frozenset({"x"})
    wide: ClassVar[int] = 2048
    run: ClassVar[int] = 512

    def init(self, site: Site) -> dict[str, Tensor]:
        m = int(site.context.get("gram_width", site.matrix[1]))
        groups = int(site.context.get("groups", 1))
        shape = (m, m) if groups == 1 else (groups, m, m)
        return {"sum": torch.zeros(shape), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        x = _rows(seen.x, seen.mask).float()
        if state["sum"].dim() == 3:
            apart = x.reshape(-1, *state["sum"].shape[:2]).transpose(0, 1)
            state["sum"].baddbmm_(apart.transpose(1, 2), apart)
            state["count"] += apart.shape[1]
            return state
        m = x.shape[1]
        run = self.run if m >= self.wide else m
        for i in range(0, m, run):
            state["sum"][i : i + run, i:].addmm_(x[:, i : i + run].T, x[:, i:])
        state["count"] += x.shape[0]
        return state

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        gram = state["sum"].div_(float(state["count"].clamp(min=1)))
        if gram.dim() == 2 and gram.shape[0] >= self.wide:
            for i in range(self.run, gram.shape[0], self.run):
                gram[i:, i - self.run : i] = gram[i - self.run : i, i:].T
        return gram


def by_rows(gram: Tensor, n: int) -> list[tuple[slice, Tensor]]:
    """Which of n output rows a Gram matrix is of: gram (m, m) of all, gram (g, m, m) of n / g rows each."""
    if gram.dim() == 2:
        return [(slice(0, n), gram)]
    step = n // gram.shape[0]
    return [(slice(i * step, (i + 1) * step), one) for i, one in enumerate(gram)]


@dataclass(frozen=True)
class Mean(Statistic):
    """A mean of inputs, one number for each entry of an axis of the matrix."""

    needs = frozenset({"x"})
    axis: ClassVar[int] = 1

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"sum": torch.zeros(site.matrix[self.axis], dtype=torch.float64), "count": torch.zeros((), dtype=torch.float64)}

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return (state["sum"] / state["count"].clamp(min=1)).float()


@dataclass(frozen=True)
class Norms(Mean):
    """Mean over sequences of the Euclidean norm of each input channel over the sequence, (m,)."""

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        x = seen.x.float() if seen.mask is None else seen.x.float().masked_fill(~seen.mask[:, None], 0.0)
        state["sum"] += x.reshape(seen.sequences, -1, x.shape[1]).norm(dim=1).double().sum(0)
        state["count"] += seen.sequences
        return state


@dataclass(frozen=True)
class Peaks(Statistic):
    """The largest size of each input channel over tokens, (m,)."""

    needs = frozenset({"x"})

    def init(self, site: Site) -> Tensor:
        return torch.zeros(site.matrix[1])

    def update(self, state: Tensor, seen: Seen) -> Tensor:
        assert seen.x is not None
        rows = _rows(seen.x, seen.mask).float().abs()
        return torch.maximum(state, rows.amax(0)) if len(rows) else state

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def finish(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True)
class Sizes(Mean):
    """Mean size of each input channel over tokens, (m,)."""

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        rows = _rows(seen.x, seen.mask).float()
        state["sum"] += rows.abs().sum(0)
        state["count"] += rows.shape[0]
        return state


@dataclass(frozen=True)
class Sample(Statistic):
    """Some inputs as they were, (rows at most, m): those whose first numbers have the least hash, which is as good as by lot, so that it
    does not matter in how many parts and in which order they came."""

    rows: int = 256
    needs = frozenset({"x"})

    def init(self, site: Site) -> Tensor:
        return torch.zeros(0, site.matrix[1])

    def update(self, state: Tensor, seen: Seen) -> Tensor:
        assert seen.x is not None
        return self.merge(state, _rows(seen.x, seen.mask).float())

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([a, b])
        return both[_hashed(both[:, :64]).argsort(stable=True)[: self.rows]]

    def finish(self, state: Tensor) -> Tensor:
        return state


def _hashed(x: Tensor) -> Tensor:
    """x (t, m) fp32 -> (t,) int64, from its bits; modulo a prime, so that no product leaves 63 bits."""
    prime = 2**31 - 1
    factors = torch.arange(1, x.shape[1] + 1, device=x.device) * 48271 % prime
    bits = x.contiguous().view(torch.int32).long() % prime
    return (bits * factors % prime).sum(1) % prime * 69621 % prime


@dataclass(frozen=True)
class CrossGram(Statistic):
    """Mean of x_ref xT over tokens, (m, m): the inputs of the original model against those of the compressed prefix."""

    needs = frozenset({"x", "reference_x"})

    def init(self, site: Site) -> dict[str, Tensor]:
        m = site.matrix[1]
        return {"sum": torch.zeros(m, m), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None and seen.reference_x is not None
        x, ref = _rows(seen.x, seen.mask).float(), _rows(seen.reference_x, seen.mask).float()
        state["sum"].addmm_(ref.T, x)
        state["count"] += x.shape[0]
        return state

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return state["sum"] / float(state["count"].clamp(min=1))


@dataclass(frozen=True)
class Fisher(Statistic):
    """Mean of grad^2 over tokens, one number for each output channel, (n,): with labels drawn from the model itself this is the diagonal
    of the Fisher information, so that half of it times a squared output error is nats a token at the model's output."""

    needs = frozenset({"grad"})

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"sum": torch.zeros(site.matrix[0]), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.grad is not None
        grad = _rows(seen.grad, seen.mask).float()
        state["sum"] += grad.square().sum(0)
        state["count"] += grad.shape[0]
        return state

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return state["sum"] / float(state["count"].clamp(min=1))


@dataclass(frozen=True)
class Lookups(Mean):
    """How often each row of a table is read: a fraction for each row, (rows,)."""

    axis = 0

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        index = _rows(seen.x.reshape(-1), seen.mask)
        state["sum"] += torch.bincount(index, minlength=state["sum"].shape[0])
        state["count"] += index.shape[0]
        return state


@dataclass(frozen=True)
class LookupFisher(Statistic):
    """Mean of grad^2 over tokens at the output of a table, one number for each column, (d,)."""

    needs = frozenset({"grad"})

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"sum": torch.zeros(site.matrix[1]), "count": torch.zeros((), dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        return Fisher().update(state, seen)

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return Fisher().finish(state)


@dataclass(frozen=True)
class Total(Statistic):
    """Sum of the rows, (m,) fp64: of counts of features, say. of: which sample is meant, where a score compares two."""

    of: str
    needs = frozenset({"x"})

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"sum": torch.zeros(site.matrix[1], dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        state["sum"] += _rows(seen.x, seen.mask).double().sum(0)
        return state

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return _add(a, b)

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        return state["sum"]


@dataclass(frozen=True)
class Extremes(Statistic):
    """Least and greatest input of each channel and of each position of a sequence, (2, m + t): row 0 the least, channels first. t is
    `positions` of the site's context, 0 where that says nothing or one; sequences of another length tell of channels alone."""

    needs = frozenset({"x"})

    def init(self, site: Site) -> dict[str, Tensor]:
        t = int(site.context.get("positions", 1))
        return {name: torch.full((2, size), -torch.inf) for name, size in (("channels", site.matrix[1]), ("positions", t if t > 1 else 0))}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        rows = _rows(seen.x, seen.mask).float()
        found = {"channels": torch.stack([(-rows).amax(0), rows.amax(0)])} if len(rows) else {}
        t = state["positions"].shape[1]
        if t and seen.x.shape[0] == t * seen.sequences:
            low, high = seen.x.float().aminmax(dim=1)
            ends = torch.stack([-low, high])
            ends = ends if seen.mask is None else ends.masked_fill(~seen.mask, -torch.inf)
            found["positions"] = ends.reshape(2, seen.sequences, t).amax(1)
        return {name: torch.maximum(part, found[name]) if name in found else part for name, part in state.items()}

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.maximum(a[name], b[name]) for name in a}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        ends = torch.cat([state["channels"], state["positions"]], 1)
        ends = torch.where(torch.isfinite(ends), ends, 0.0)
        return torch.stack([-ends[0], ends[1]])


@dataclass(frozen=True)
class Opening(Statistic):
    """Least and greatest input of each channel at the first position of a sequence, (2, m): row 0 the least. The length of a sequence is
    `positions` of the site's context; sequences of another length, and sites where it says nothing, tell nothing."""

    needs = frozenset({"x"})

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"ends": torch.full((2, site.matrix[1]), -torch.inf), "positions": torch.tensor(int(site.context.get("positions", 1)))}

    def update(self, state: dict[str, Tensor], seen: Seen) -> dict[str, Tensor]:
        assert seen.x is not None
        t = int(state["positions"])
        if t < 2 or seen.x.shape[0] != t * seen.sequences:
            return state
        rows = _rows(seen.x[::t], None if seen.mask is None else seen.mask[::t]).float()
        return {**state, "ends": torch.maximum(state["ends"], torch.stack([(-rows).amax(0), rows.amax(0)]))} if len(rows) else state

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.maximum(a[name], b[name]) for name in a}

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        ends = torch.where(torch.isfinite(state["ends"]), state["ends"], 0.0)
        return torch.stack([-ends[0], ends[1]])
