"""A model rewritten along its edges so that it computes the same and is easier to round.

A stage before all others, as a cut is: `Aligned` is opened like any model, so pricing, plans, forms and tuning see it as their original,
and only measuring compares with the model that was given. What is found is one small tensor for each edge; every weight is rewritten when
it is read, so that nothing is stored twice and no more than one segment is in memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.architectures import DecoderAnatomy, decoder_anatomy
from laconic.artifact import stand
from laconic.calibration import Observer, Walk, release
from laconic.core.errors import BrokenPromise, UserError
from laconic.core.part import Part
from laconic.core.site import Anatomy, Edge, Gated, Norm, Site, Stage
from laconic.core.statistic import Statistic
from laconic.core.transform import Align, Change, Move, Stretched, Turned
from laconic.models import Derived, Source, TensorInfo
from laconic.pipeline import finished_logits
from laconic.recipe import Aligning

Progress = Callable[[str, int, int, str], None]

# logits before and after may differ by the order of sums, not more
EXACT = 1e-4


class Edit(NamedTuple):
    """What a move does to one stored tensor: along `axis`, at (width, copies) of its indices; `plus` is what a norm adds to what it
    stores."""

    axis: int
    at: Tensor
    move: Move
    reads: bool
    plus: float = 0.0


def edited(value: Tensor, edit: Edit) -> Tensor:
    """A tensor after one edit, in its own dtype."""
    value = value.movedim(edit.axis, 0).clone()
    for at in edit.at.T:
        rows = value[at]
        if isinstance(edit.move, Turned):
            flat = rows.reshape(len(at), -1)
            value[at] = (edit.move.matrix.to(value).T @ flat).reshape(rows.shape)
        else:
            assert isinstance(edit.move, Stretched)
            factors = edit.move.factors.to(value).reshape(-1, *[1] * (rows.dim() - 1))
            value[at] = rows / factors if edit.reads else (rows + edit.plus) * factors - edit.plus
    return value.movedim(0, edit.axis)


def edits_of(edge: Edge, move: Move) -> dict[str, list[Edit]]:
    """Stored tensor -> what a move along an edge does to it: to weights along the edge's axis, and to biases that go with outputs."""
    found: dict[str, list[Edit]] = {}
    for reads, members in ((False, edge.writers), (True, edge.readers)):
        for member in members:
            if reads and member in edge.writers:
                # a tied table: it is written and read along one axis
                raise UserError(f"{member.site.name} both writes and reads {edge.name}; a move along it is not exact")
            for role, tensor in member.site.tensors.items():
                if role == "weight" or member.axis == 0:
                    at = torch.tensor([list(member.index(i)) for i in range(edge.width)])
                    axis = member.stored_axis if role == "weight" else 0
                    plus = _plus(member.site) if role == "weight" else 0.0
                    found.setdefault(tensor.name, []).append(Edit(axis, at, move, reads, plus))
    return found


def _plus(site: Site) -> float:
    """What a norm adds to what it stores; nothing at other sites."""
    return float(site.context.get("plus", 0.0))


def kept_as_it_is(edge: Edge, move: Move, read: Callable[[Site], Tensor]) -> Move:
    """A scale of what a norm gives, each factor moved to the next with which the norm's scale is a bf16 number, since that is how norms are
    stored: the readers' columns then take in what is really there."""
    for norm in (member.site for member in edge.writers if isinstance(member.site.kind, Norm)):
        if isinstance(move, Stretched):
            scale = read(norm).double() + _plus(norm)
            stored = (scale * move.factors - _plus(norm)).to(torch.bfloat16).double() + _plus(norm)
            factors = stored / scale
            move = Stretched(torch.where(torch.isfinite(factors) & (factors > 0), factors, move.factors.double()))
    return move


class Folded(NamedTuple):
    """A norm's scale that a reader takes in along `axis`; `plus` is what the norm adds to what is stored."""

    axis: int
    norm: str
    plus: float


class Aligned(Derived):
    """A model with parts in their places and moves along its edges."""

    def __init__(self, original: Source, parts: Mapping[str, Part], moves: Mapping[str, Move]) -> None:
        Derived.__init__(self, original)
        self.parts = dict(parts)
        # what the parts hold besides what they took over
        self.extra: dict[str, Tensor] = {}
        self.infos: dict[str, TensorInfo] = dict(original.infos)
        skeleton = self.skeleton()
        for path in self.parts:
            for name, buffer in skeleton.get_submodule(path).named_buffers(recurse=False):
                self._add(f"{path}.{name}", torch.ones(buffer.shape))
        self._anatomy = self._made(skeleton)
        self.edits: dict[str, list[Edit]] = {}
        self.folds: dict[str, list[Folded]] = {}
        self.ones: dict[str, float] = {}
        self.moves = dict(moves)
        for edge in self._anatomy.edges():
            if (move := moves.get(edge.name)) is not None:
                self._take_in(edge, move)

    def _add(self, name: str, value: Tensor) -> None:
        self.extra[name] = value
        self.infos[name] = TensorInfo(torch.float32, tuple(value.shape), "", 0, 4 * value.numel())

    def _made(self, skeleton: nn.Module) -> Anatomy:
        """The original's anatomy, with what its parts have laid open."""
        before = self.original.anatomy
        assert isinstance(before, DecoderAnatomy)
        gates = {act.module for edge in before.edges() if (act := edge.may(Gated)) is not None}
        row = replace(before.row, opened=bool(gates) and gates <= set(self.parts))
        stored = {name: self.tied.get(name, name) for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        return decoder_anatomy(row, self.config, {name: info.shape for name, info in self.infos.items()}, stored)

    def _take_in(self, edge: Edge, move: Move) -> None:
        if isinstance(move, Turned):
            for fold in edge.folds:
                norm, plus = fold.norm.tensors["weight"].name, float(fold.norm.context["plus"])
                self.ones[norm] = 1.0 - plus
                for reader in fold.readers:
                    name = reader.site.tensors["weight"].name
                    self.folds.setdefault(name, []).append(Folded(reader.stored_axis, norm, plus))
        for name, edits in edits_of(edge, move).items():
            self.edits.setdefault(name, []).extend(edits)
        if (act := edge.may(Gated)) is not None:
            assert isinstance(move, Stretched)
            self._add(f"{act.module}.gate_scale", 1.0 / move.factors)
        for name in (*self.edits, *self.folds, *self.ones):
            self.infos[name] = self.infos[name]._replace(dtype=torch.float32)

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    @property
    def placed(self) -> dict[str, Any]:
        """The parts in words."""
        return {path: part.describe() for path, part in sorted(self.parts.items())}

    def exact(self) -> Aligned:
        """The same with nothing rounded in its parts."""
        return Aligned(self.original, {path: part.exact() for path, part in self.parts.items()}, self.moves)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.extra:
            return self.extra[name][start:stop].clone()
        edits, folds = self.edits.get(name, []), self.folds.get(name, [])
        if not edits and not folds and name not in self.ones:
            return self.original.read_rows(name, start, stop)
        # rows are mixed with rows that were not asked for
        whole = any(edit.axis == 0 for edit in edits) or any(fold.axis == 0 for fold in folds)
        if name in self.ones:
            value = torch.full(self.original.infos[name].shape, self.ones[name], dtype=torch.float64)
            value = value if whole else value[start:stop]
        else:
            value = (self.original.read(name) if whole else self.original.read_rows(name, start, stop)).double()
        for fold in folds:
            scale = self.original.read(fold.norm).double() + fold.plus
            value = value * (scale if fold.axis else scale[:, None])
        for edit in edits:
            value = edited(value, edit)
        return (value[start:stop] if whole else value).float()

    def skeleton(self) -> nn.Module:
        model = self.original.skeleton()
        for path, part in self.parts.items():
            stand(model, path, type(part).restore(part.describe()))
        return model


def has_edges(source: Source) -> bool:
    """Whether a model's edges are known."""
    return isinstance(source.anatomy, DecoderAnatomy)


def align(source: Source, inputs: Tensor, aligning: Aligning, method: Align, *, batch: int, work: Any, progress: Progress) -> Aligned:
    """The model rewritten by a method: one walk over it with its parts in place for what the method wants to see, then one move for each
    edge, journalled, then a comparison of both models' logits on the first inputs."""
    if not has_edges(source):
        raise UserError(
            f"{aligning.method} acts along edges, which are known of language models with a row of data only; leave `align` out"
        )
    parts: dict[str, Part] = {}
    for edge in source.anatomy.edges():
        if aligning.covers(edge.name):
            parts.update(method.opens(edge))
    opened = Aligned(source, parts, {})
    edges = [edge for edge in opened.anatomy.edges() if aligning.covers(edge.name)]
    value = work.done("align")
    if value is None:
        read = functools.partial(_weight, source)
        changes = _settled(opened.exact(), inputs, method, edges, read, batch, progress)
        tensors: dict[str, Tensor] = {}
        kinds: dict[str, str] = {}
        notes: list[str] = []
        for change in (changes[edge.name] for edge in edges):
            notes += change.notes
            for at, found in change.move:
                move = kept_as_it_is(at, found, read)
                kinds[at.name] = type(move).__name__
                tensors[at.name] = move.matrix if isinstance(move, Turned) else move.factors  # type: ignore[attr-defined]
        value = {"moves": kinds, "notes": notes}
        work.finish("align", value, tensors)
    held = work.tensors("align") if value["moves"] else {}
    moves = {name: Turned(held[name]) if kind == "Turned" else Stretched(held[name]) for name, kind in value["moves"].items()}
    aligned = Aligned(source, parts, moves)
    if (judged := work.done("align/exact")) is None:
        judged = {"difference": difference(source, aligned.exact(), inputs[:1])}
        work.finish("align/exact", judged)
    if not judged["difference"] <= EXACT:
        raise BrokenPromise(
            f"the model rewritten by {aligning.method} computes something else: its logits differ by {judged['difference']:.2e} of their "
            f"norm (bound {EXACT:g})"
        )
    aligned.notes = (*aligned.notes, *value["notes"])
    left = [edge.name for edge in edges if edge.name not in moves]
    aligned.record = {"method": aligning.method, "moves": value["moves"], "left": left, "placed": aligned.placed, **judged}
    return aligned


def difference(source: Source, aligned: Aligned, inputs: Tensor) -> float:
    """Norm of the difference between both models' logits over the norm."""
    with torch.no_grad():
        first, second = (next(finished_logits(opened, inputs, inputs.shape[0])) for opened in (source, aligned))
    return float((second - first).norm() / first.norm().clamp(min=1e-12))


def _weight(source: Source, site: Site) -> Tensor:
    value = source.read(site.tensors["weight"].name).float()
    return value.T if site.transposed else value


def _settled(
    source: Aligned,
    inputs: Tensor,
    method: Align,
    edges: Sequence[Edge],
    read: Callable[[Site], Tensor],
    batch: int,
    progress: Progress,
) -> dict[str, Change]:
    """What the method does at each edge. An edge is settled as soon as the walk has passed all that it wants to see there, so that
    statistics of a few layers are in memory at a time."""
    looks = {edge.name: method.looks(edge) for edge in edges}
    wanted: dict[str, dict[Statistic, Site]] = {}
    for site, statistic in itertools.chain(*looks.values()):
        wanted.setdefault(site.name, {})[statistic] = site
    stats: dict[str, dict[Statistic, Tensor]] = {}
    changes: dict[str, Change] = {}
    passed: set[str] = set()
    # after the last layer nothing more comes: what lies outside of the layers was not seen
    unseen: dict[str, dict[Statistic, Tensor]] = {name: {} for name in wanted}
    for here in itertools.chain(_seen(source, inputs, wanted, batch, progress), (unseen,)):
        stats.update((name, found) for name, found in here.items() if name not in passed)
        passed.update(here)
        due = [edge for edge in edges if edge.name not in changes and all(site.name in passed for site, _ in looks[edge.name])]
        for edge in due:
            changes[edge.name] = method(edge, read, {site.name: stats[site.name] for site, _ in looks[edge.name]})
        later = {site.name for name, some in looks.items() if name not in changes for site, _ in some}
        stats = {name: found for name, found in stats.items() if name in later}
    return changes


def _seen(
    source: Aligned, inputs: Tensor, wanted: Mapping[str, Mapping[Statistic, Site]], batch: int, progress: Progress
) -> Iterator[dict[str, dict[Statistic, Tensor]]]:
    """What is wanted of each layer's sites, layer by layer, from one walk; each site is seen once however many edges ask for it."""
    if not wanted:
        return
    walk = Walk(source, inputs, batch=batch)
    walk.begin()
    for number, segment in enumerate(walk.layers):
        progress("aligning", number, len(walk.layers), segment.name)
        module = walk.take(segment)
        here = {name: asked for name, asked in wanted.items() if name.startswith(f"{segment.name}.")}
        stats: dict[str, dict[Statistic, Tensor]] = {name: {} for name in here}
        observers, hooks = [], []
        for statistic in dict.fromkeys(kind for asked in here.values() for kind in asked):
            sites = [asked[statistic] for asked in here.values() if statistic in asked]
            observers.append((Observer([Stage((site,)) for site in sites], (statistic,)), sites))
            hooks += [hook for site in sites for hook in observers[-1][0].attach(site, walk.site_module(module, segment, site))]
        walk.advance(module, segment)
        for hook in hooks:
            hook.remove()
        for observer, sites in observers:
            for site in sites:
                stats[site.name].update(observer.finish(site))
        release(module)
        yield stats
