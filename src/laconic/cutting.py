"""Coupled channels removed for good: which groups of a model may be cut, what each channel is worth, how many of each group go, and the
smaller model that is left.

A cut is a stage before all others: `Reduced` is opened like any model, so pricing, plans, forms and tuning see it as their original and
know nothing of cuts, and only measuring compares with the model that was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from laconic.anatomy import TracedAnatomy, traced_anatomy
from laconic.architectures import DecoderAnatomy, decoder_anatomy
from laconic.calibration import Walk, answer_of, joined, observed, release
from laconic.core.errors import UserError
from laconic.core.score import Everywhere, keep_top
from laconic.core.site import Anatomy, Embedding, Group, Member, Scan, Segment, Site
from laconic.core.transform import Cut
from laconic.kernels.place import CPU, here, on
from laconic.kernels.threads import suited
from laconic.models import Derived, Source
from laconic.narrow import Shape, narrow, narrowed
from laconic.recipe import Cutting

Progress = Callable[[str, int, int, str], None]

# each matrix keeps this share of its channels whatever they are worth, so that no layer falls to nothing
LEAST = 0.1
# masking and removing may differ by the order of sums, not more
SAME = 1e-3


class Offered(NamedTuple):
    """A group that may be cut: its name is that of the first matrix that writes its channels; `segment` holds all of it."""

    name: str
    group: Group
    segment: str


class Weighed(NamedTuple):
    """Groups that may be cut, what each channel of each is worth, and why the others stay."""

    groups: tuple[Offered, ...]
    worth: Mapping[str, Tensor]
    left: Mapping[str, str]


class Covering(Protocol):
    """What a recipe says of the groups that it means."""

    def covers(self, name: str) -> bool:
        """Whether it means a group, by its name."""


# canonical indices that go, by the name of the group
Gone = Mapping[str, Sequence[int]]


# ---- which groups


def segments_of(source: Source) -> tuple[Segment, ...]:
    """What is held at once: a module that was given is in memory anyway."""
    segments = source.anatomy.segments()
    return (joined(segments),) if source.traced else segments


def _name(group: Group) -> str:
    writers = [m.site.name for m in group.members if not m.reads and len(m.site.shape) > 1]
    return writers[0] if writers else f"{group.members[0].site.name} (its inputs)"


def groups_of(source: Source, cutting: Covering) -> tuple[list[Offered], dict[str, str]]:
    """The groups that lie in one segment and that the recipe allows, and why each other one is left."""
    found: list[Offered] = []
    left: dict[str, str] = {}
    seen: set[tuple[str, int]] = set()
    home = {name: segment.name for segment in segments_of(source) for name in segment.tensors}
    for site in source.anatomy.sites():
        for axis in (0, 1):
            if (site.name, axis) in seen:
                continue
            try:
                group = source.anatomy.coupled(site, axis)
            except UserError as error:
                left.setdefault(site.name, str(error))
                continue
            seen.update((m.site.name, m.axis) for m in group.members)
            name = _name(group)
            lies = {home.get(tensor.name, "") for m in group.members for tensor in m.site.tensors.values()}
            if (why := _why_not(group, lies, cutting, name)) is not None:
                left.setdefault(name, why)
            else:
                found.append(Offered(name, group, lies.pop()))
    return found, left


def _why_not(group: Group, lies: set[str], cutting: Covering, name: str) -> str | None:
    if group.fixed:
        return "the model's own inputs or outputs"
    if group.width < 2:
        return "a single channel"
    if any("tied" in m.site.roles for m in group.members):
        return "a table that is the head too reads them"
    if any(isinstance(m.site.kind, Scan) for m in group.members):
        return "a state-space scan holds something for each of them"
    if len(lies) > 1:
        return "they run through more than one layer of the stack"
    if not any(m.reads for m in group.members):
        return "no matrix reads them"
    return None if cutting.covers(name) else "the recipe leaves them"


# ---- what a cut does to tensors


def kept_of(group: Group, gone: Sequence[int]) -> tuple[int, ...]:
    """Canonical indices that stay."""
    away = set(gone)
    return tuple(i for i in range(group.width) if i not in away)


def _axes(member: Member) -> list[tuple[str, int]]:
    """Stored tensors of a member that have its slices, and the axis they lie along."""
    return [
        (tensor.name, member.stored_axis if role == "weight" else 0)
        for role, tensor in member.site.tensors.items()
        if role == "weight" or member.axis == 0
    ]


def places(groups: Iterable[Offered], gone: Gone) -> dict[str, dict[int, list[int]]]:
    """Stored tensor -> axis -> its indices that go."""
    found: dict[str, dict[int, list[int]]] = {}
    for name, group, _ in groups:
        if not gone.get(name):
            continue
        for member in group.members:
            own = member.slices(gone[name])
            for tensor, axis in _axes(member) if own else ():
                found.setdefault(tensor, {})[axis] = own
    return found


def without(value: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    """A tensor without the indices that go along each axis."""
    for axis, away in axes.items():
        value = value.index_select(axis, _stays(value.shape[axis], away))
    return value


def _stays(size: int, away: Sequence[int]) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[torch.tensor(list(away), dtype=torch.int64)] = False
    return stays.nonzero()[:, 0]


def shapes_of(source: Source, groups: Iterable[Offered], gone: Gone) -> dict[str, Shape]:
    """New shapes of the stored tensors that become smaller."""
    found = {}
    for name, axes in places(groups, gone).items():
        shape = list(source.infos[name].shape)
        for axis, away in axes.items():
            shape[axis] -= len(away)
        found[name] = tuple(shape)
    return found


# ---- what channels are worth


def drawn(source: Source, inputs: Tensor, cutting: Cutting, seed: int) -> Tensor:
    """The inputs that statistics are taken from: the calibration rows, or noise of their shape, which needs none of them."""
    if cutting.inputs == "data":
        return inputs
    if not inputs.is_floating_point() and next(source.anatomy.sites(Embedding), None) is None:
        raise UserError("noise for ids needs a table that they are looked up in, and this model has none; give the cut `inputs: data`")
    return noise(source, inputs, seed)


def noise(source: Source, inputs: Tensor, seed: int) -> Tensor:
    """Standard normal numbers in the shape of inputs, or ids drawn evenly from the first table that is read."""
    generator = torch.Generator().manual_seed(seed)
    if inputs.is_floating_point():
        return torch.randn(inputs.shape, generator=generator)
    table = next(source.anatomy.sites(Embedding))
    return torch.randint(table.shape[0], inputs.shape, generator=generator)


def weigh(
    source: Source, inputs: Tensor, cutting: Covering, method: Cut, *, batch: int, work: Any, progress: Progress, key: str = "cut/worth"
) -> Weighed:
    """What each channel of each group is worth, from one walk of the original; journalled under `key`. A group whose removal does not
    give what masking it gives (its module's forward fixes the width, or a norm averages over it) is left, by name."""
    offered, left = groups_of(source, cutting)
    if (value := work.done(key)) is not None:
        worth = work.tensors(key)
        return Weighed(tuple(o for o in offered if o.name in worth), worth, value["left"])
    walk = Walk(source, inputs, batch=batch, whole=source.traced)
    walk.begin()
    worth = {}
    # layers of one type are alike, so what was tried in one of them need not be tried in the next
    tried: dict[Any, str | None] = {}
    segments = segments_of(source)
    for number, segment in enumerate(segments):
        here = [o for o in offered if o.segment == segment.name]
        progress("weighing channels", number, len(segments), segment.name)
        if not segment.name and walk.layers:
            # stem and head are no layer: what couples them runs through the stack
            left.update(dict.fromkeys((o.name for o in here), "they lie outside the layers"))
            continue
        module = walk.take(segment)
        fit = []
        for one in here:
            kind = (type(module), *((_path(segment, m.site.name), m.axis, m.site.shape) for m in one.group.members))
            if kind not in tried:
                tried[kind] = _unfit(walk, module, segment, one)
            if (why := tried[kind]) is None:
                fit.append(one)
            else:
                left[one.name] = why
        sites = {site.name: site for one in fit for site in method.sites(one.group)}
        stats = walk.observe(module, segment, list(sites.values()), method.wants) if sites and method.wants else {}
        for one in fit:
            weights = {m.site.name: _weight(walk, module, segment, m.site) for m in one.group.members if len(m.site.shape) > 1}
            own = {site.name: observed(stats, site, method.wants) for site in method.sites(one.group)}
            worth[one.name] = method.worth(one.group, weights, own)
        if segment.name:
            walk.advance(module, segment)
            release(module)
    work.finish(key, {"left": left}, worth)
    return Weighed(tuple(o for o in offered if o.name in worth), worth, left)


def _weight(walk: Walk, module: nn.Module, segment: Segment, site: Site) -> Tensor:
    weight: Tensor = walk.site_module(module, segment, site).weight.detach()  # type: ignore[union-attr, assignment, operator]
    return weight.T if site.transposed else weight


def _path(segment: Segment, name: str) -> str:
    return name[len(segment.name) + 1 :] if segment.name else name


def _first(walk: Walk, module: nn.Module, segment: Segment) -> Tensor:
    """What a segment computes of its first batch; of a whole model, of its first two inputs."""
    if not segment.name:
        with torch.no_grad():
            return answer_of(module(walk.inputs[:2], **walk._plain))
    return next(walk.outputs(module, segment))


def _small(walk: Walk, module: nn.Module, segment: Segment, groups: Sequence[Offered], gone: Gone) -> tuple[nn.Module, dict[str, Tensor]]:
    """The segment's module without what goes, and its smaller tensors by stored name."""
    axes = places(groups, gone)
    tied: Mapping[str, str] = walk.source.tied  # type: ignore[attr-defined]
    own: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for path, value in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        full = f"{segment.name}.{path}" if segment.name else path
        if (name := tied.get(full, full)) in axes:
            own[path] = stored[name] = stored[name] if name in stored else without(value.detach(), axes[name])
    return narrowed(module, own), stored


def _unfit(walk: Walk, module: nn.Module, segment: Segment, one: Offered) -> str | None:
    """Why a group cannot be cut, found by trying it without its first channel and without every third; None where it can."""
    for away in ([0], list(range(1, one.group.width, 3))):
        before = {}
        for member in one.group.members:
            if member.reads:
                weight = _weight(walk, module, segment, member.site)
                before[member.site.name] = (weight, weight.clone())
                weight.index_fill_(1, torch.tensor(member.slices(away), dtype=torch.int64), 0.0)
        masked = _first(walk, module, segment)
        for weight, old in before.values():
            weight.copy_(old)
        try:
            small = _first(walk, _small(walk, module, segment, [one], {one.name: away})[0], segment)
        except Exception as error:
            # any module may be asked, and its forward may fail in any way
            return f"the module does not run without some of them ({type(error).__name__})"
        if small.shape != masked.shape or not _near(small, masked):
            return "the module computes something else without some of them than with zeros in their place"
    return None


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= SAME * b.norm().clamp(min=1e-12))


# ---- how many go


def stored_bytes(source: Source, shapes: Mapping[str, Shape]) -> int:
    """Bytes of the whole model as it is kept: floating point as bf16."""
    return sum(
        math.prod(shapes.get(name, info.shape)) * (2 if info.dtype.is_floating_point else info.dtype.itemsize)
        for name, info in source.infos.items()
    )


class _Counted:
    """Bytes of the whole model for so many channels gone of each group, without making a tensor."""

    def __init__(self, source: Source, groups: Sequence[Offered]) -> None:
        self.source = source
        # tensor -> axis -> (group, how many of its indices go with each channel)
        self.slices: dict[str, dict[int, tuple[str, Tensor]]] = {}
        for name, group, _ in groups:
            for member in group.members:
                each = torch.tensor([len(member.index(i)) for i in range(group.width)])
                for tensor, axis in _axes(member):
                    self.slices.setdefault(tensor, {})[axis] = (name, each)

    def __call__(self, gone: Mapping[str, Tensor]) -> int:
        """gone: (width,) bool by group."""
        shapes = {}
        for tensor, axes in self.slices.items():
            shape = list(self.source.infos[tensor].shape)
            for axis, (name, each) in axes.items():
                shape[axis] -= int(each[gone[name]].sum())
            shapes[tensor] = tuple(shape)
        return stored_bytes(self.source, shapes)


def _protected(group: Group, worth: Tensor) -> Tensor:
    """(width,) true for channels that stay whatever they are worth: of each member the best of those that it has (one that lies beside
    others in a concatenation, or under a padded shortcut, has some of the group's)."""
    stay = torch.zeros(group.width, dtype=torch.bool)
    for member in group.members:
        has = torch.tensor([i for i in range(group.width) if len(member.index(i))])
        stay[has] |= keep_top(worth[has], max(1, math.ceil(LEAST * len(has))), among=Everywhere())
    return stay


def share(source: Source, weighed: Weighed, bound: int, *, even: bool) -> dict[str, list[int]]:
    """Channels that go so that the model fits `bound` bytes, as few as possible. even: the same share of each group, the least worth of
    it; else the least worth of all groups together, with LEAST of each member kept. UserError where not enough can go."""
    count = _Counted(source, weighed.groups)
    worth = [weighed.worth[o.name] for o in weighed.groups]
    stay = [_protected(o.group, one) for o, one in zip(weighed.groups, worth, strict=True)]
    names, widths = [o.name for o in weighed.groups], [len(one) for one in worth]
    free = [int((~one).sum()) for one in stay]
    steps = max(widths) if even else sum(free)

    def gone_at(step: int) -> dict[str, Tensor]:
        if even:
            # what does not divide stays
            kept = [width - min(some, width * step // steps) for width, some in zip(widths, free, strict=True)]
            kinds = zip(worth, kept, stay, strict=True)
            found = [~keep_top(one, left, among=Everywhere(), protect=fast) for one, left, fast in kinds]
        else:
            joint = keep_top(torch.cat(worth), sum(widths) - step, among=Everywhere(), protect=torch.cat(stay))
            found = list((~joint).split(widths))
        return dict(zip(names, found, strict=True))

    low, high = 0, steps
    if count(gone_at(high)) > bound:
        least = count(gone_at(high))
        raise UserError(
            f"the budget of {bound:,} bytes is below what cutting channels can reach: the least is {least:,} bytes; ask for that or more, "
            "or add a quantizer to the recipe's choices and a `keep` to its cut"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(gone_at(middle)) <= bound else (middle + 1, high)
    return {name: mask.nonzero()[:, 0].tolist() for name, mask in gone_at(low).items()}


# ---- the smaller model


def remove(
    source: Source, inputs: Tensor, cutting: Cutting, method: Cut, groups: Sequence[Offered], gone: Gone, *,
    batch: int, prefix: str, work: Any, progress: Progress,
) -> Reduced:  # fmt: skip
    """The model without what goes. Readers are settled in order of execution, each from what reaches it with those before it settled;
    writers are left as they are until then, since a channel that no one reads is gone."""
    parts: dict[str, Mapping[str, Any]] = {}
    walk: Walk | None = None
    segments = segments_of(source)
    touched = {o.segment for o in groups if gone.get(o.name)}
    todo = [segment for segment in segments if segment.name in touched]
    if not all(work.done(f"{prefix}/{segment.name}") for segment in todo):
        walk = Walk(source, inputs if method.wants else inputs[:batch], batch=batch, whole=source.traced)
        walk.begin()
    for number, segment in enumerate(segments):
        if not segment.name and segment.name not in touched:
            continue
        key = f"{prefix}/{segment.name}"
        value = work.done(key) if segment.name in touched else None
        here = [o for o in groups if o.segment == segment.name and gone.get(o.name)]
        if walk is not None:
            progress("cutting channels", number, len(segments), segment.name)
            module = walk.take(segment)
            if value is None and here:
                tensors, notes = _cut_segment(walk, module, segment, here, gone, method)
                value = {"tensors": sorted(tensors), "notes": notes}
                work.finish(key, value, tensors)
            elif here:
                _put_back(walk, module, segment, here, gone, work.tensors(key))
            if segment.name:
                walk.advance(module, segment)
                release(module)
        if value is not None:
            parts[key] = value
    reduced = Reduced(source, work, parts, shapes_of(source, groups, gone))
    if cutting.norms and (found := _norms(source, reduced, places(groups, gone), inputs, batch, f"{prefix}:norms", work)) is not None:
        reduced.add(f"{prefix}:norms", found)
    return reduced


def _readers(here: Sequence[Offered]) -> dict[str, tuple[Offered, Member]]:
    return {member.site.name: (one, member) for one in here for member in one.group.members if member.reads}


def _cut_segment(
    walk: Walk, module: nn.Module, segment: Segment, here: Sequence[Offered], gone: Gone, method: Cut
) -> tuple[dict[str, Tensor], list[str]]:
    readers = _readers(here)
    notes: list[str] = []
    for site in segment.sites:
        if site.name not in readers:
            continue
        one = readers[site.name][0]
        stats = walk.observe(module, segment, [site], method.wants) if method.wants else {}
        weight = _weight(walk, module, segment, site)
        with suited(weight.numel()):
            found = {site.name: observed(stats, site, method.wants)}
            change = method(one.group, {site.name: weight}, found, kept_of(one.group, gone[one.name]))
        weight.copy_(change.fold[site.tensors["weight"]])
        notes += change.notes
    # the check runs all of the layer, and none of it from kept inputs
    walk.forget()
    small, tensors = _small(walk, module, segment, here, gone)
    if not _near(_first(walk, small, segment), _first(walk, module, segment)):
        raise ValueError(f"what is left of {segment.name or 'the model'} computes something else than it does with what goes masked")
    return {name: value.clone() for name, value in tensors.items()}, list(dict.fromkeys(notes))


def _put_back(walk: Walk, module: nn.Module, segment: Segment, here: Sequence[Offered], gone: Gone, tensors: Mapping[str, Tensor]) -> None:
    """A settled segment in its old shape, from what was kept of it: readers with zeros where slices went."""
    axes = places(here, gone)
    for _, member in _readers(here).values():
        weight: Tensor = walk.site_module(module, segment, member.site).weight.data  # type: ignore[union-attr, assignment]
        name = member.site.tensors["weight"].name
        away = axes[name]
        weight.index_fill_(member.stored_axis, torch.tensor(away.get(member.stored_axis, []), dtype=torch.int64), 0.0)
        index = [_stays(size, away.get(axis, ())) for axis, size in enumerate(weight.shape)]
        weight[torch.meshgrid(*index, indexing="ij")] = tensors[name].to(weight.dtype)


class Moments(NamedTuple):
    """Mean and variance of what reaches a norm."""

    mean: Tensor
    var: Tensor


def moments(module: nn.Module, inputs: Tensor, batch: int) -> dict[str, Moments]:
    """Of each batch norm of a module, which is used up, over all inputs, each norm working with those of its batch."""
    norms = {name: inner for name, inner in module.named_modules() if _running(inner)}
    for inner in norms.values():
        inner.reset_running_stats()  # type: ignore[operator]
        # the mean over all batches
        inner.momentum = None  # type: ignore[assignment]
        inner.train()
    with torch.no_grad():
        for rows in here(inputs).split(batch):
            module(rows)
    return {name: Moments(inner.running_mean, inner.running_var) for name, inner in norms.items()}  # type: ignore[arg-type]


def _running(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)


def _norms(
    source: Source, reduced: Reduced, axes: Mapping[str, Mapping[int, Sequence[int]]], inputs: Tensor, batch: int, key: str, work: Any
) -> dict[str, Any] | None:
    """Running statistics of batch norms, moved by as much as the cut has moved what reaches them: on training data that is to take them
    anew, and on noise it leaves those of the data in place. None where the model has none."""
    if (value := work.done(key)) is not None:
        return value  # type: ignore[no-any-return]
    if not source.traced or not any(_running(m) for m in source.skeleton().modules()):
        return None
    first = moments(source.load(torch.float32), inputs, batch)
    second = moments(reduced.load(torch.float32), inputs, batch)
    tensors = {}
    for name, now in second.items():
        own = [f"{name}.running_mean", f"{name}.running_var"]
        stored = [source.tied.get(one, one) for one in own]
        was = [without(value, axes.get(at, {})) for value, at in zip(first[name], stored, strict=True)]
        mean, var = (reduced.read(at).float() for at in stored)
        tensors[stored[0]] = mean + now.mean - was[0]
        tensors[stored[1]] = var * ((now.var + 1e-8) / (was[1] + 1e-8))
    value = {"tensors": sorted(tensors), "notes": []}
    work.finish(key, value, tensors)
    return value


class Reduced(Derived):
    """A model without what was cut out of it."""

    def __init__(self, original: Source, work: Any, parts: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Shape]) -> None:
        Derived.__init__(self, original)
        self.work, self.shapes = work, dict(shapes)
        self.infos = {
            name: info._replace(dtype=torch.float32, shape=self.shapes[name], file="", start=0, stop=4 * math.prod(self.shapes[name]))
            if name in self.shapes
            else info
            for name, info in original.infos.items()
        }
        self.held: dict[str, str] = {}
        self.cached: tuple[str, dict[str, Tensor]] = ("", {})
        self._anatomy: Anatomy | None = None
        for key, value in parts.items():
            self.add(key, value)

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Take the tensors of a finished stage in."""
        self.held.update(dict.fromkeys(value["tensors"], key))
        self.notes = tuple(dict.fromkeys((*self.notes, *value["notes"])))

    @property
    def anatomy(self) -> Anatomy:
        if self._anatomy is None:
            before = self.original.anatomy
            if isinstance(before, TracedAnatomy):
                with torch.inference_mode(False), on(CPU):
                    self._anatomy = traced_anatomy(self.load(torch.float32), before.example)
            else:
                assert isinstance(before, DecoderAnatomy)
                names = [name for name, _ in self.original.skeleton().named_parameters(remove_duplicate=False)]
                stored = {name: self.tied.get(name, name) for name in names}
                self._anatomy = decoder_anatomy(before.row, self.config, {n: i.shape for n, i in self.infos.items()}, stored)
        return self._anatomy

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if (key := self.held.get(name)) is None:
            return self.original.read_rows(name, start, stop)
        if self.cached[0] != key:
            self.cached = (key, self.work.tensors(key))
        value = here(self.cached[1][name])
        return value[start:stop].clone() if value.dim() else value.clone()

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Any = ()) -> None:
        Source.fill(self, module, prefix, dtype, skip=skip)
        self.cached = ("", {})

    def skeleton(self) -> nn.Module:
        return narrow(self.original.skeleton(), lambda name: self.shapes.get(self.tied.get(name, name)))


# ---- what is said and stored of a cut


def recorded(weighed: Weighed, cutting: Cutting, gone: Gone, how: str, judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a plan says of a cut: every group with what goes, and why the others stay."""
    groups = []
    for name, group, _ in weighed.groups:
        away = sorted(gone.get(name, ()))
        members = sorted({m.site.name for m in group.members})
        groups.append({"group": name, "channels": group.width, "kept": group.width - len(away), "members": members, "gone": away})
    left = [{"group": name, "why": why} for name, why in weighed.left.items()]
    return {"method": cutting.method, "inputs": cutting.inputs, "share": how, "groups": groups, "left": left, "judged": list(judged)}


def asked(source: Source, cutting: Cutting, plan: Mapping[str, Any]) -> tuple[Weighed, dict[str, list[int]]]:
    """The cut of a plan that was given. UserError where it names a group or a channel that the model does not have."""
    offered, left = groups_of(source, cutting)
    of = {o.name: o for o in offered}
    gone: dict[str, list[int]] = {}
    for entry in plan["groups"]:
        if (one := of.get(entry["group"])) is None:
            raise UserError(f"the plan cuts {entry['group']}, which is no group of this model; make the plan again for this model")
        away = sorted({int(i) for i in entry["gone"]})
        if away and not (away[0] >= 0 and away[-1] < one.group.width and len(away) < one.group.width):
            raise UserError(
                f"the plan cuts channels {away[0]} to {away[-1]} of {one.name}, which has {one.group.width}; one at least must stay"
            )
        gone[one.name] = away
    left.update({entry["group"]: entry["why"] for entry in plan["left"]})
    return Weighed(tuple(of[name] for name in gone), {}, left), gone


# words of configs for the width of the feed-forward part and for the heads
MLP_WIDTH, QUERY_HEADS, KV_HEADS = ("intermediate_size", "ffn_dim", "n_inner"), ("num_attention_heads",), ("num_key_value_heads",)


def config_of(reduced: Reduced, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json of the smaller model, and the shapes that it does not say: none where all layers were cut alike and its words for widths
    say it all, else those of every tensor that was cut, beside the original's config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = {name: list(shape) for name, shape in sorted(reduced.shapes.items())}
    anatomy = reduced.anatomy
    if not shapes or not isinstance(anatomy, DecoderAnatomy):
        return dict(config), shapes
    sites = list(anatomy.sites())
    widths = {site.shape[1] for site in sites if site.roles.get("part") == "down"}
    heads = {site.shape[1] // anatomy.head_dim for site in sites if site.roles.get("part") == "o"}
    if len(widths) != 1 or len(heads) != 1:
        return dict(config), shapes
    new = dict(config)
    (width,), (count,) = widths, heads
    said = dict.fromkeys(MLP_WIDTH, width) | dict.fromkeys(QUERY_HEADS, count)
    said |= dict.fromkeys(KV_HEADS, count * anatomy.kv_heads // anatomy.heads)
    new |= {word: value for word, value in said.items() if hasattr(reduced.config, word)}
    if hasattr(reduced.config, "head_dim"):
        new["head_dim"] = anatomy.head_dim
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**new))
    except Exception:
        # a config may refuse such numbers in any way, and the shapes say the same
        return dict(config), shapes
    same = {name: p.shape for name, p in built.named_parameters()} == {name: p.shape for name, p in reduced.skeleton().named_parameters()}
    return (new, {}) if same else (dict(config), shapes)
