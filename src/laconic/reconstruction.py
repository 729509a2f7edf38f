"""Learning a compressed model part by part: one block, several neighbouring ones, or one layer after another.

Each part learns on the inputs that the compressed model before it gives, to meet what the original gives there. Two walks go side by side,
one through the original and one through the model as it is learned so far, so that a block of each is in memory at most, with the hidden
states of both. A part that was learned is journalled at once: a cut run goes on with the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.calibration import KEPT, Opened, Shelf, Shelved, Walk, columns_of, fed, release
from laconic.core.packed import Packed, Soft, below
from laconic.core.site import Conv, Linear, Segment, Site
from laconic.core.transform import Layer, Lesson, Window
from laconic.models import stored_paths
from laconic.tuning import Run, Targets, tune

# batches on which a part's error is measured before and after
MEASURED = 4
# images that a step sees at least
IMAGES = 32


class View(Opened, Protocol):
    """A compressed model that takes new forms in: tensors of `add`ed parts from there, everything else as before."""

    forms: dict[str, Any]

    def packed(self, name: str) -> Packed | None: ...
    def add(self, key: str, value: Mapping[str, Any]) -> None: ...


@dataclass
class Reconstruction:
    """One run over a model. source: the original; view: what is learned, and is seen through `view` from then on; inputs (count, ...)."""

    source: Any
    view: View
    inputs: Tensor
    lesson: Lesson
    seed: int
    work: Any
    progress: Callable[[str, int, int, str], None]
    # of each part: the objective before and after
    errors: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self) -> str:
        """Learns everything; says in a sentence what came of it."""
        # images are small: a step sees as many as in the papers
        batch = self.lesson.batch if self.source.task == "text" else max(self.lesson.batch, IMAGES)
        walk, original = (Walk(opened, self.inputs, batch=batch) for opened in (self.view, self.source))
        walk.begin()
        original.begin()
        if walk.whole:
            self._layers(walk, original, walk.rest)
        elif isinstance(self.lesson.scope, Window):
            for stack in walk.stacks:
                self._windows(walk, original, [walk.layers[number] for number in stack], self.lesson.scope)
        else:
            for segment in walk.layers:
                self._layers(walk, original, segment)
        return self._said(walk)

    def _said(self, walk: Walk) -> str:
        if not self.errors:
            return "nothing of the blocks could be learned"
        kind = "layers one by one" if walk.whole or isinstance(self.lesson.scope, Layer) else "blocks one by one"
        if isinstance(self.lesson.scope, Window) and self.lesson.scope.blocks > 1 and not walk.whole:
            kind = f"windows of {self.lesson.scope.blocks} blocks"
        shares = sorted(after / before if before else 1.0 for before, after in self.errors)
        said = (
            f"learned {kind}, {self.lesson.steps} steps each: {self.lesson.objective.name} of the output on calibration rows falls to "
            f"{shares[len(shares) // 2]:.1%} of that before (from {shares[0]:.1%} to {shares[-1]:.1%})"
        )
        if walk.whole and isinstance(self.lesson.scope, Window):
            said += "; the model has no blocks that a walk can hold, so its layers were learned"
        outside = [name for name in self._names([walk.rest]) if not walk.whole]
        return said + (f"; outside the blocks {len(outside)} stay as they were" if outside else "")

    # ---- windows of blocks

    def _windows(self, walk: Walk, original: Walk, layers: Sequence[Segment], scope: Window) -> None:
        live: dict[str, Soft] = {}
        ahead = 0
        for start in range(0, len(layers), scope.blocks - scope.overlap):
            span = layers[start : start + scope.blocks]
            last = start + scope.blocks >= len(layers)
            settled = span if last else span[: scope.blocks - scope.overlap]
            # the original first: one of the two has a window in memory at a time
            models = [original.take(segment) for segment in span]
            for module, segment in zip(models[max(0, ahead - start) :], span[max(0, ahead - start) :], strict=True):
                original.advance(module, segment)
            ahead = start + len(span)
            key = f"learned/{span[0].name}"
            value = self.work.done(key)
            todo = value is None and bool(self._names(span))
            targets = self._targets(walk, original, list(zip(models, span, strict=True))) if todo else []
            for module in models:
                release(module)
            if todo:
                value = self._window(walk, key, span, settled, live, targets)
            live = {} if value is None else self._going_on(key, value)
            if value is not None:
                self._take_in(key, value)
            for segment in settled:
                module = walk.take(segment)
                walk.advance(module, segment)
                release(module)
            if last:
                return

    def _names(self, segments: Sequence[Segment]) -> list[str]:
        """Stored names of what is held in some form, in order of execution."""
        names = [site.tensors["weight"].name for segment in segments for site in segment.sites]
        return [name for name in dict.fromkeys(names) if name in self.view.forms]

    def _soft(self, name: str) -> Soft | None:
        packed = self.view.packed(name)
        assert packed is not None
        return self.lesson.soften(packed, self.source.read(name).float().reshape(packed.shape))

    def _going_on(self, key: str, value: Mapping[str, Any]) -> dict[str, Soft]:
        """What goes on learning in the next window, as it stood at the end of this one."""
        live: dict[str, Soft] = {}
        tensors = self.work.tensors(key) if value["live"] else {}
        for name in value["live"]:
            soft = self._soft(name)
            assert soft is not None
            soft.load_state_dict(below(tensors, f"live/{name}"))
            live[name] = soft
        return live

    def _targets(self, walk: Walk, original: Walk, models: Sequence[tuple[nn.Module, Segment]]) -> Targets:
        """What each batch must meet at the end of a window."""
        if self.lesson.targets == "float":
            return list(original.hidden)
        walk.reach(models[0][1])
        with torch.no_grad():
            prefix = [walk.chained(models, i) for i in range(len(walk.hidden))]
        if self.lesson.targets == "prefix":
            return prefix
        return [torch.stack(pair) for pair in zip(original.hidden, prefix, strict=True)]

    def _window(
        self, walk: Walk, key: str, span: Sequence[Segment], settled: Sequence[Segment], live: dict[str, Soft], targets: Targets
    ) -> dict[str, Any]:
        modules = [walk.take(segment).requires_grad_(False) for segment in span]
        softs = dict(live)
        for name in self._names(span):
            if name not in softs and (soft := self._soft(name)) is not None:
                softs[name] = soft
        paths = [stored_paths(self.source, module, segment.name) for module, segment in zip(modules, span, strict=True)]
        for module, path in zip(modules, paths, strict=True):
            for name, at in path.items():
                if name in softs:
                    _feeding(module.get_submodule(at.rpartition(".")[0]), softs[name])

        def run(i: int, weights: Mapping[str, Tensor]) -> Tensor:
            models = [
                (functools.partial(_with, module, {at: weights[name] for name, at in path.items() if name in weights}), segment)
                for module, path, segment in zip(modules, paths, span, strict=True)
            ]
            return self._met(walk.chained(models, i))

        value = self._learn(key, softs, set(self._names(settled)), run, targets, " and ".join(segment.name for segment in span))
        for module in modules:
            release(module)
        return value

    def _met(self, output: Tensor) -> Tensor:
        """An output as often as it has targets."""
        return output if self.lesson.targets != "both" else torch.stack((output, output))

    # ---- one layer after another

    def _layers(self, walk: Walk, original: Walk, segment: Segment) -> None:
        module, reference = walk.take(segment).requires_grad_(False), original.take(segment)
        shelf = Shelf(self.work.folder / "learning", KEPT)
        for site in segment.sites:
            name = site.tensors["weight"].name
            if name not in self.view.forms or not isinstance(site.kind, Linear | Conv):
                continue
            key = f"learned/{site.name}"
            leaf = walk.site_module(module, segment, site)
            if (value := self.work.done(key)) is None and (soft := self._soft(name)) is not None:
                count = self._seen(walk, original, module, reference, segment, site, shelf)
                if count:
                    _feeding(leaf, soft)
                    run = functools.partial(self._layer, leaf, site, shelf)
                    value = self._learn(key, {name: soft}, {name}, run, Shelved(shelf, count, "y"), site.name)
                shelf.clear()
            if value is not None:
                self._take_in(key, value)
                weight: Any = leaf.weight
                form = self.view.packed(name)
                weight.data.copy_(form.dense().reshape(weight.shape))  # type: ignore[union-attr]
                fed(leaf, form)
        if segment.name:
            original.advance(reference, segment)
            walk.advance(module, segment)
        release(module)
        release(reference)

    def _layer(self, leaf: nn.Module, site: Site, shelf: Shelf, i: int, weights: Mapping[str, Tensor]) -> Tensor:
        """One layer's output for batch i as rows."""
        (weight,) = weights.values()
        return self._met(columns_of(site, _with(leaf, {"weight": weight}, shelf.get(f"x{i}"))))

    def _seen(self, walk: Walk, original: Walk, module: nn.Module, reference: nn.Module, segment: Segment, site: Site, shelf: Shelf) -> int:
        """Puts what the site is given, and what it must give, on the shelf; how many batches there are."""
        theirs: Iterator[tuple[Tensor, Tensor] | None] = original.passing(reference, segment, site)
        own = original.site_module(reference, segment, site)
        # a token that the compressed router sends elsewhere has no counterpart: an expert meets its own weights on its own tokens
        alone = self.lesson.targets == "prefix" or "expert" in site.context
        count = 0
        for mine in walk.passing(module, segment, site):
            other = None if alone else next(theirs)
            if mine is None or not mine[0].numel():
                continue
            with torch.no_grad():
                prefix = columns_of(site, own(mine[0])) if alone or self.lesson.targets == "both" else None
            wished = prefix if other is None else columns_of(site, other[1])
            assert wished is not None
            if self.lesson.targets == "both":
                wished = torch.stack((wished, wished if prefix is None else prefix))
            shelf.put(f"x{count}", mine[0].clone())
            shelf.put(f"y{count}", wished.contiguous())
            count += 1
        return count

    # ---- both

    def _learn(self, key: str, softs: dict[str, Soft], settled: set[str], run: Run, targets: Targets, note: str) -> dict[str, Any]:
        """Learns some forms and journals them: those that are settled hard, the others as they stand."""
        before = self._error(softs, run, targets)
        tune(
            run, targets, softs, self.lesson,
            generator=torch.Generator().manual_seed(self.seed),
            progress=lambda done, total: self.progress("tuning", done, total, note),
        )  # fmt: skip
        value: dict[str, Any] = {"forms": {}, "kept": [], "live": [], "errors": [before, self._error(softs, run, targets)]}
        tensors: dict[str, Tensor] = {}
        for name, soft in softs.items():
            if name in settled:
                packed = soft.harden()
                value["forms"][name] = packed.describe()
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.tensors().items()}
            else:
                value["live"].append(name)
                tensors |= {f"live/{name}.{leaf}": tensor for leaf, tensor in soft.state_dict().items()}
        self.work.finish(key, value, tensors)
        return value

    def _error(self, softs: Mapping[str, Soft], run: Run, targets: Targets) -> float:
        """The objective with what would be stored now, over the first batches."""
        with torch.no_grad():
            weights = {name: soft.harden().dense() for name, soft in softs.items()}
            count = min(MEASURED, len(targets))
            return sum(float(self.lesson.objective(run(i, weights), targets[i], None)) for i in range(count)) / count

    def _take_in(self, key: str, value: Mapping[str, Any]) -> None:
        self.view.add(key, value)
        self.errors.append((value["errors"][0], value["errors"][1]))


def _feeding(layer: nn.Module, soft: Soft) -> None:
    """A layer takes its inputs as a form that learns does, where that has a say in it."""
    if soft.feed is not None:
        fed(layer, soft)


def _with(module: nn.Module, weights: Mapping[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """A module's output with other weights, by their path in it."""
    return torch.func.functional_call(module, dict(weights), args, kwargs)
