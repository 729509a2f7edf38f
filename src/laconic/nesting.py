"""Channels held in nested slices: the best first, so that the first slices of a layer are a narrower layer, all in the same weights.

A nested model is made from an applied one whose weights are kept as they are. Permuting coupled channels is exact, so nothing of what it
computes changes; what is new is how its tensors are held, and in `elastic.py` how slices follow one another in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laconic.core.errors import UserError
from laconic.core.packed import Joined, Packed, Transposed
from laconic.core.site import Conv, Group, Linear, Member
from laconic.core.transform import Cut
from laconic.cutting import Offered, weigh
from laconic.models import Source
from laconic.pipeline import Applied, Parts, finished_logits, probe_of
from laconic.recipe import Nesting

Progress = Callable[[str, int, int, str], None]
KEY = "nest"


class Slot(NamedTuple):
    """How one stored tensor is held: its indices along `axis` in their new order, how many are in each slice of a run, and the runs."""

    tensor: str
    axis: int
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    runs: int
    transposed: bool


def counts_of(width: int, widths: Sequence[float]) -> list[int]:
    """How many of `width` channels each size has: at least one, each size more than the one before."""
    return sorted({max(1, math.ceil(share * width - 1e-9)) for share in widths})


def laid(member: Member, width: int) -> tuple[int, int] | None:
    """(runs, indices for each channel in a run) of how a member's axis holds a group's channels, None where they are interleaved in another
    way: side by side (1, k), or one run of all channels after another (k, 1)."""
    own = [list(member.index(i)) for i in range(width)]
    each = len(own[0])
    if not each or any(len(one) != each for one in own) or each * width != member.index.width:
        return None
    if [j for one in own for j in one] == list(range(each * width)):
        return 1, each
    if [one[run] for run in range(each) for one in own] == list(range(each * width)):
        return each, 1
    return None


def unfit(group: Group, taken: set[str]) -> str | None:
    """Why a group's channels cannot be nested; None where they can."""
    for member in group.members:
        if not isinstance(member.site.kind, Linear | Conv):
            return "something else than matrices holds them (a norm would see other channels at each width)"
        if member.site.context.get("groups", 1) != 1:
            return "a convolution with groups holds them"
        if laid(member, group.width) is None:
            return "their slices are interleaved with others in one tensor"
        if member.site.tensors["weight"].name in taken:
            return "a matrix of theirs is nested along its other axis"
    return None


def slots_of(group: Group, worth: Tensor, counts: Sequence[int]) -> list[Slot]:
    """How every tensor of a group is held, the channel of the greatest worth first; ties in their old order."""
    order = worth.double().argsort(descending=True, stable=True).tolist()
    found = []
    for member in group.members:
        runs, each = laid(member, group.width) or (1, 1)
        own = [member.index(i)[run] for run in range(each) for i in order] if runs > 1 else [j for i in order for j in member.index(i)]
        steps = tuple((b - a) * each if runs == 1 else b - a for a, b in zip([0, *counts[:-1]], counts, strict=True))
        for role, tensor in member.site.tensors.items():
            weight = role == "weight"
            if weight or member.axis == 0:
                found.append(Slot(tensor.name, member.axis if weight else 0, tuple(own), steps, runs, weight and member.site.transposed))
    return found


def held(slot: Slot, value: Tensor) -> Packed:
    """A stored tensor in its slices."""
    oriented = value.T if slot.transposed else value
    form = Joined.of(oriented.index_select(slot.axis, torch.tensor(slot.order)), slot.sizes, slot.axis, slot.runs)
    return Transposed(form) if slot.transposed else form


def nest(
    source: Source, inputs: Tensor, applied: Applied, nesting: Nesting, method: Cut, *, batch: int, work: Any, progress: Progress
) -> tuple[Applied, dict[str, Any]]:
    """The applied model with its channels in order and in slices, and what plans say of it. Each part is written anew under its own key; a
    run that was cut off goes on after the last one. UserError where nothing can be nested."""
    weighed = weigh(source, inputs, nesting, method, batch=batch, work=work, progress=progress, key=f"{KEY}/worth")
    left, taken = dict(weighed.left), set[str]()
    groups: list[Offered] = []
    for one in weighed.groups:
        why = unfit(one.group, taken)
        if why is None and len(counts_of(one.group.width, nesting.widths)) < 2:
            why = "there are too few of them"
        if why is not None:
            left[one.name] = why
            continue
        groups.append(one)
        taken.update(member.site.tensors["weight"].name for member in one.group.members)
    if not groups:
        name, why = next(iter(left.items()), ("the model", "it has no coupled channels"))
        raise UserError(f"the recipe finds no channels that can be nested in this model ({name}: {why}); take another recipe")
    slots = {o.name: slots_of(o.group, weighed.worth[o.name], counts_of(o.group.width, nesting.widths)) for o in groups}
    slot_of = {slot.tensor: slot for found in slots.values() for slot in found}
    keys = [f"{KEY}/{part}" for part in applied.parts]
    for key, part in zip(keys, applied.parts, strict=True):
        value = work.done(part)
        if work.done(key) is not None:
            continue
        tensors = dict(work.tensors(part))
        forms = dict(value["forms"])
        for name in value["kept"]:
            if name in slot_of:
                form = held(slot_of[name], tensors.pop(name))
                forms[name] = form.describe()
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in form.tensors().items()}
        kept = [name for name in value["kept"] if name not in forms]
        work.finish(key, {**value, "forms": forms, "kept": kept}, tensors)
    view = Parts(source, work)
    for key in keys:
        view.add(key, work.done(key))
    probe = next(finished_logits(view, probe_of(source, inputs), 1))
    view.cached = ("", {})
    record = {
        "method": nesting.method,
        "groups": [
            {
                "group": o.name,
                "channels": o.group.width,
                "counts": counts_of(o.group.width, nesting.widths),
                "tensors": [slot.tensor for slot in slots[o.name]],
            }
            for o in groups
        ],
        "left": [{"group": name, "why": why} for name, why in left.items()],
    }
    return applied._replace(parts=tuple(keys), forms=dict(view.forms), probe=probe, view=view), record
