"""Whole plans measured at the model's output: forms that were made once are switched in, nothing is compressed again.

All plans of a call go through the model together, one segment in memory at a time, and what begins alike is run once: a plan that differs
from another in the last block costs one block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.calibration import WIDE, FewRows, Walk, fed, kept_tensor, release
from laconic.core.menu import Damage, Judges, Plan, Row
from laconic.core.packed import Dense, Packed, below, restore
from laconic.core.site import Segment
from laconic.core.transform import Objective
from laconic.models import stored_paths
from laconic.tuning import Targets

Product = Callable[[Tensor], Tensor]
# hidden states of the plans that go through the model together take at most this many bytes
HELD = 1024**3

# the method of a row that leaves its tensor as it is
AS_IS = "kept"


def form_key(row: Row) -> str:
    """Where the journal keeps what a row would store."""
    where = row.site or min(row.covers)
    return f"form/{where}/{row.method}{json.dumps(dict(row.level), sort_keys=True)}"


class Trials(Judges):
    """Plans over rows of search data, their forms read from the journal as they are needed. original: gives the outputs that each row must
    meet, asked once and only if there is anything to measure. The damage is the objective's mean over rows."""

    def __init__(self, source: Any, rows: Sequence[Tensor], original: Callable[[], Targets], objective: Objective, work: Any) -> None:
        self.source, self.inputs, self.objective, self.work = source, rows, objective, work
        self.rows = len(rows)
        self._original = original
        self._wanted: Targets | None = None

    def by(self, objective: Objective) -> Trials:
        """The same plans by another objective. The outputs that they must meet are made once for both."""
        return Trials(self.source, self.inputs, self.wanted, objective, self.work)

    def wanted(self) -> Targets:
        """The outputs that each row must meet."""
        if self._wanted is None:
            self._wanted = self._original()
        return self._wanted

    def form(self, row: Row, name: str) -> Packed:
        """What the row would store of a tensor, as pricing made it."""
        if row.method == AS_IS:
            return Dense(kept_tensor(self.source.read(name)))
        key = form_key(row)
        value = self.work.done(key)
        if value is None:
            raise ValueError(f"{key} is not in the journal; only plans of the menu that was priced can be tried")
        return restore(value["forms"][name], below(self.work.tensors(key), name))

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        part = range(self.rows) if part is None else part
        size = max(1, HELD // sum(self._states(self.inputs[i]) for i in part))
        return [damage for i in range(0, len(plans), size) for damage in self._together(plans[i : i + size], part)]

    def _states(self, row: Tensor) -> int:
        """Bytes of a row's hidden states."""
        anatomy = self.source.anatomy
        width = next((site.matrix[1] for segment in anatomy.segments() if segment.name for site in segment.sites), 1)
        tokens = row.numel() if self.source.task == "text" else row.shape[0] * getattr(anatomy, "positions", 1)
        return 4 * tokens * width

    def _together(self, plans: Sequence[Plan], part: Sequence[int]) -> list[Damage]:
        targets = self.wanted()
        rows = [self.inputs[i] for i in part]
        walk = Walk(self.source, torch.cat(rows), batch=rows[0].shape[0])
        walk.batches = rows * len(plans)
        found = [0.0] * len(plans)
        for i, out in enumerate(_outputs(walk, _Placing(self, walk, plans, len(rows)))):
            wanted = targets[part[i % len(rows)]]
            if self.source.task == "text":
                # the last token of a row predicts nothing that is here
                out, wanted = out[:, :-1], wanted[:, :-1]
            found[i // len(rows)] += float(self.objective(out, wanted, None)) / len(rows)
            del out, wanted
        return [Damage(value, self.objective.unit, f"model output, {len(rows)} rows of search data") for value in found]


class _Placing:
    """Which plan's forms stand in the walk's model."""

    def __init__(self, trials: Trials, walk: Walk, plans: Sequence[Plan], rows: int) -> None:
        self.trials, self.walk, self.rows = trials, walk, rows
        # by stored tensor: the row that settles it, and that row's name
        self.chosen: list[dict[str, tuple[Row, str]]] = []
        for plan in plans:
            named = [(row, form_key(row)) for row in plan.rows]
            self.chosen.append({name: (row, key) for row, key in named for name in row.covers})
        self.placed: dict[str, str] = {}
        self.now = 0
        # plans of one number have computed the same so far
        self.alike = [0] * len(plans)
        head = walk.head_name()
        self.language = any(site.roles.get("part") == "embed" for site in walk.rest.sites)
        owners = (site for site in walk.rest.sites if self.language and (site.name == head or site.roles.get("tied") == head))
        names = (site.tensors["weight"].name for site in owners)
        self.owner = next((name for name in names if name in self.chosen[0]), None)
        self.product: tuple[str, Product] | None = None

    def put(self, name: str, at: int, target: FewRows | Tensor, layer: nn.Module) -> None:
        """Plan `at`'s form of a stored tensor where the model reads it: in a layer's parameter, or as the rows needed of a table."""
        row, key = self.chosen[at].get(name, (None, ""))
        if row is None or self.placed.get(name) == key:
            return
        form = self.trials.form(row, name)
        if isinstance(target, FewRows):
            target.rows = form.rows(target.index).float()
        else:
            target.data.copy_(form.dense().reshape(target.shape))
            fed(layer, form)
        self.placed[name] = key

    def outside(self, i: int) -> None:
        """What stands outside the layers, for batch i. A language model's head is taken when it is its turn (`head`)."""
        self.now = i // self.rows
        for site in self.walk.rest.sites:
            module = self.walk.model.get_submodule(site.name)
            name = site.tensors["weight"].name
            if isinstance(module, FewRows) or not self.language:
                self.put(name, self.now, module if isinstance(module, FewRows) else module.weight, module)  # type: ignore[arg-type]

    def within(self, module: nn.Module, segment: Segment) -> Callable[[int], None]:
        """What is done before a batch runs through a segment."""
        own = stored_paths(self.trials.source, module, segment.name)
        parameters = [
            (name, module.get_parameter(path), module.get_submodule(path.rpartition(".")[0]))
            for name, path in own.items()
            if name in self.chosen[0]
        ]

        def ready(i: int) -> None:
            for name, p, layer in parameters:
                self.put(name, i // self.rows, p, layer)

        return ready

    def split(self, tensors: Sequence[str]) -> list[int]:
        """Takes in that these tensors are about to be read: plans that differ in them are alike no longer. -> for each batch the first that
        has the same states and forms."""
        numbers: dict[Any, int] = {}
        settled = [name for name in tensors if name in self.chosen[0]]
        self.alike = [
            numbers.setdefault((before, *(chosen[name][1] for name in settled)), len(numbers))
            for before, chosen in zip(self.alike, self.chosen, strict=True)
        ]
        return [self.alike.index(number) * self.rows + i for number in self.alike for i in range(self.rows)]

    def head(self, x: Tensor) -> Tensor:
        """Logits by the head of the plan whose turn it is."""
        assert self.owner is not None
        row, key = self.chosen[self.now][self.owner]
        if self.product is None or self.product[0] != key:
            self.product = key, self._product(self.trials.form(row, self.owner))
        return self.product[1](x)

    def _product(self, form: Packed) -> Product:
        source, name = self.trials.source, f"{self.walk.head_name()}.bias"
        stored = source.tied.get(name, name)
        bias = source.read(stored).float() if stored in source.infos else None
        if form.shape[0] * form.shape[1] > WIDE:
            return lambda x: form.matmul(x) if bias is None else form.matmul(x) + bias
        dense, feed = form.dense(), form.feed
        return lambda x: F.linear(x if feed is None else feed(x), dense, bias)


def _outputs(walk: Walk, placing: _Placing) -> Iterator[Tensor]:
    """The output of every batch, each with the forms of its plan."""
    walk.ready = placing.outside
    walk.begin()
    if walk.whole:
        yield from walk.outputs(walk.take(walk.rest), walk.rest)
        return
    placing.split(walk.rest.tensors)
    for segment in walk.layers:
        walk.ready = placing.outside
        module = walk.take(segment)
        walk.ready = placing.within(module, segment)
        walk.advance(module, segment, placing.split(segment.tensors))
        release(module)
    walk.ready = placing.outside
    yield from walk.logits(placing.head if placing.owner is not None else None)


class Recorded(Judges):
    """What a judge said, journalled question by question. A search is a function of its arguments, so one that was cut off is run again: it
    gets the answers that were given, goes on where it stood, and ends as it would have."""

    def __init__(self, judge: Judges, work: Any, measure: str = "") -> None:
        self.judge, self.work, self.measure = judge, work, measure
        self.rows = judge.rows

    def by(self, objective: Objective) -> Recorded:
        return Recorded(self.judge.by(objective), self.work, repr(objective))

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        asked = json.dumps([[sorted(form_key(row) for row in plan.rows) for plan in plans], None if part is None else list(part)])
        key = f"search/{hashlib.sha256((self.measure + asked).encode()).hexdigest()}"
        found = self.work.done(key)
        if found is None:
            found = {"said": [list(damage) for damage in self.judge(plans, part)]}
            self.work.finish(key, found)
        return [Damage(*damage) for damage in found["said"]]
