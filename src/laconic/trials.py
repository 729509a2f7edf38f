"""Whole plans measured at the model's output: forms that were made once are switched in, nothing is compressed again.

All plans of a call go through the model together, one segment in memory at a time, and what begins alike is run once: a plan that differs
from another in the last block costs one block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.calibration import WIDE, FewRows, Walk, release
from laconic.core.menu import Damage, Judge, Plan, Row
from laconic.core.packed import Packed, below, restore
from laconic.core.site import Site
from laconic.core.transform import Objective
from laconic.tuning import Targets

Product = Callable[[Tensor], Tensor]


def form_key(row: Row) -> str:
    """Where the journal keeps what a row would store."""
    return f"form/{row.site}/{row.method}{json.dumps(dict(row.level), sort_keys=True)}"


class Trials(Judge):
    """Plans over rows of search data, their forms read from the journal as they are needed. original: gives the outputs that each row must
    meet, asked once and only if there is anything to measure. The damage is the objective's mean over rows."""

    def __init__(self, source: Any, rows: Sequence[Tensor], original: Callable[[], Targets], objective: Objective, work: Any) -> None:
        self.source, self.inputs, self.objective, self.work = source, rows, objective, work
        self.rows = len(rows)
        self._original = original
        self._wanted: Targets | None = None

    def form(self, row: Row) -> Packed:
        """What the row would store, as pricing made it."""
        (name,) = row.covers
        key = form_key(row)
        value = self.work.done(key)
        if value is None:
            raise ValueError(f"{key} is not in the journal; only plans of the menu that was priced can be tried")
        return restore(value["forms"][name], below(self.work.tensors(key), name))

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        part = range(self.rows) if part is None else part
        if self._wanted is None:
            self._wanted = self._original()
        rows = [self.inputs[i] for i in part]
        walk = Walk(self.source, torch.cat(rows), batch=rows[0].shape[0])
        walk.batches = rows * len(plans)
        found = [0.0] * len(plans)
        for i, out in enumerate(_outputs(walk, _Placing(self, walk, plans, len(rows)))):
            wanted = self._wanted[part[i % len(rows)]]
            if self.source.task == "text":
                # the last token of a row predicts nothing that is here
                out, wanted = out[:, :-1], wanted[:, :-1]
            found[i // len(rows)] += float(self.objective(out, wanted, None)) / len(rows)
            del out, wanted
        return [Damage(value, "nats/token", f"model output, {len(rows)} rows of search data") for value in found]


class _Placing:
    """Which plan's forms stand in the walk's model."""

    def __init__(self, trials: Trials, walk: Walk, plans: Sequence[Plan], rows: int) -> None:
        self.trials, self.walk, self.rows = trials, walk, rows
        self.chosen: list[Mapping[str, Row]] = [{row.site: row for row in plan.rows} for plan in plans]
        self.keys = [{row.site: form_key(row) for row in plan.rows} for plan in plans]
        self.placed: dict[str, str] = {}
        self.now = 0
        # plans of one number have computed the same so far
        self.alike = [0] * len(plans)
        head = walk.head_name()
        language = any(site.roles.get("part") == "embed" for site in walk.rest.sites)
        owners = (site for site in walk.rest.sites if language and (site.name == head or site.roles.get("tied") == head))
        self.owner = next((site for site in owners if site.name in self.keys[0]), None)
        self.product: tuple[str, Product] | None = None

    def put(self, sites: Sequence[Site], at: int, module_of: Callable[[Site], nn.Module]) -> None:
        """Plan `at`'s forms in the modules of these sites."""
        self.now = at
        for site in sites:
            key = self.keys[at].get(site.name)
            module = module_of(site)
            if key is None or self.placed.get(site.name) == key:
                continue
            if isinstance(module, FewRows):
                module.rows = self.trials.form(self.chosen[at][site.name]).rows(module.index).float()
            elif self.owner is None or site.name != self.owner.name:
                weight: Tensor = module.weight.data  # type: ignore[union-attr, assignment]
                weight.copy_(self.trials.form(self.chosen[at][site.name]).dense().reshape(weight.shape))
            self.placed[site.name] = key

    def split(self, sites: Sequence[Site]) -> list[int]:
        """Takes in that these sites are about to be run: plans that differ in them are alike no longer. -> for each batch the first that
        has the same states and forms."""
        numbers: dict[Any, int] = {}
        self.alike = [
            numbers.setdefault((before, *(keys.get(site.name) for site in sites)), len(numbers))
            for before, keys in zip(self.alike, self.keys, strict=True)
        ]
        return [self.alike.index(number) * self.rows + i for number in self.alike for i in range(self.rows)]

    def head(self, x: Tensor) -> Tensor:
        """Logits by the head of the plan whose turn it is."""
        assert self.owner is not None
        key = self.keys[self.now][self.owner.name]
        if self.product is None or self.product[0] != key:
            self.product = key, self._product(self.trials.form(self.chosen[self.now][self.owner.name]))
        return self.product[1](x)

    def _product(self, form: Packed) -> Product:
        source, name = self.trials.source, f"{self.walk.head_name()}.bias"
        stored = source.tied.get(name, name)
        bias = source.read(stored).float() if stored in source.infos else None
        if form.shape[0] * form.shape[1] > WIDE:
            return lambda x: form.matmul(x) if bias is None else form.matmul(x) + bias
        dense = form.dense()
        return lambda x: F.linear(x, dense, bias)


def _outputs(walk: Walk, placing: _Placing) -> Any:
    """The output of every batch, each with the forms of its plan."""
    outside = walk.rest.sites

    def rest(i: int) -> None:
        placing.put(outside, i // placing.rows, lambda site: walk.model.get_submodule(site.name))

    walk.ready = rest
    if walk.whole:
        walk.begin()
        yield from walk.outputs(walk.take(walk.rest), walk.rest)
        return
    walk.begin()
    placing.split(outside)
    for segment in walk.layers:
        walk.ready = rest
        module = walk.take(segment)

        def inside(i: int, module: nn.Module = module, segment: Any = segment) -> None:
            placing.put(segment.sites, i // placing.rows, lambda site: walk.site_module(module, segment, site))

        walk.ready = inside
        walk.advance(module, segment, placing.split(segment.sites))
        release(module)
    walk.ready = rest
    yield from walk.logits(placing.head if placing.owner is not None else None)


class Recorded(Judge):
    """What a judge said, journalled call by call. A search is a function of its arguments, so one that was cut off is run again: it gets
    the answers that were given, goes on where it stood, and ends as it would have."""

    def __init__(self, judge: Judge, work: Any) -> None:
        self.judge, self.work = judge, work
        self.rows = judge.rows
        self.calls = 0

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        key = f"search/{self.calls}"
        self.calls += 1
        asked = json.dumps([[sorted(form_key(row) for row in plan.rows) for plan in plans], None if part is None else list(part)])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        found = self.work.done(key)
        if found is None or found["asked"] != digest:
            said = self.judge(plans, part)
            found = {"asked": digest, "said": [list(damage) for damage in said]}
            self.work.finish(key, found)
        return [Damage(*damage) for damage in found["said"]]
