"""Results that load at any size up to their own: what is held in parts, put in one order, so that every prefix of it is a model.

The order is found by trial: the model with some parts of each tensor, and one part more of a single one, for many of them in one walk.
What is written (`elastic.json`): `slices`, a tensor's name each time that it gets its next part, with the bytes of the whole model up to
and including it; `together`, what other tensors get theirs with it; the weight files hold the tensors in that order, so that a budget is a
prefix of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.calibration import KEPT, Shelf, Shelved, Walk, release
from laconic.core.errors import UserError
from laconic.core.menu import Damage, Order
from laconic.core.packed import Packed
from laconic.core.site import Anatomy
from laconic.kernels.losses import Divergence
from laconic.models import Source
from laconic.narrow import Shape, narrow, narrowed
from laconic.pipeline import UNIT, Progress, filed, finished_logits, quiet

MEASURED = "model output, search data"
# what makes a value, or takes it from a journal where it is already there
Once = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


def at_once(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A Once without a journal."""
    return make()


def refuse_stacks(anatomy: Anatomy) -> None:
    """UserError for what trials cannot go along with yet: variants of one stack would have to be carried through the next."""
    stacks = dict.fromkeys(segment.name.rpartition(".")[0] for segment in anatomy.segments() if segment.name)
    if len(stacks) > 1:
        raise UserError(
            f"this model has {len(stacks)} stacks of layers ({', '.join(stacks)}), whose parts are not ordered yet; use another recipe"
        )


class Stacks(NamedTuple):
    """What is held in parts, by name: the bytes of each part, the names of its tensors in the file, the stored tensors that get their parts
    together (the stack has the name of the first), and the shapes of those that are smaller with fewer parts, by stored name."""

    bytes: dict[str, tuple[int, ...]]
    tensors: dict[str, tuple[tuple[str, ...], ...]]
    members: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[Shape, ...]]


class Cut:
    """A model with the first few parts of some of its forms: `counts` of them, by the name of the stack. `base` is everything else."""

    def __init__(self, base: Any, form: Callable[[str], Packed | None], counts: Mapping[str, int], stacks: Stacks) -> None:
        self.base, self.form, self.counts, self.stacks = base, form, counts, stacks
        self.owner = {member: name for name, members in stacks.members.items() for member in members}
        # what a Source's `fill` looks at besides `read`
        self.tied, self._computed = base.tied, base._computed

    @property
    def anatomy(self) -> Anatomy:
        return self.base.anatomy  # type: ignore[no-any-return]

    def skeleton(self) -> nn.Module:
        def smaller(parameter: str) -> Shape | None:
            name = self.tied.get(parameter, parameter)
            shapes = self.stacks.shapes.get(name)
            return None if shapes is None else shapes[self.counts[self.owner[name]] - 1]

        bare: nn.Module = self.base.skeleton()
        return narrow(bare, smaller) if self.stacks.shapes else bare

    def dense(self, name: str, more: int = 0) -> Tensor:
        """A tensor of so many parts, and `more`."""
        form = self.form(name)
        assert form is not None
        return form.first(self.counts[self.owner[name]] + more).dense()

    def read(self, name: str) -> Tensor:
        return self.dense(name) if name in self.owner else self.base.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.dense(name)[start:stop] if name in self.owner else self.base.read_rows(name, start, stop)

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Sequence[str] = ()) -> None:
        Source.fill(self, module, prefix, dtype, skip=skip)  # type: ignore[arg-type]


def stacks_of(names: Sequence[str], form: Callable[[str], Packed | None], together: Mapping[str, Sequence[str]] | None = None) -> Stacks:
    """The forms among `names` that have parts; each with the tensors that get theirs at the same time, where it is a name of `together`."""
    found = Stacks({}, {}, {}, {})
    for name in names:
        members = tuple((together or {}).get(name, (name,)))
        forms = {member: packed for member in members if (packed := form(member)) is not None and packed.parts > 1}
        if not forms:
            continue
        count = forms[members[0]].parts
        cuts = {member: [packed.first(i) for i in range(1, count + 1)] for member, packed in forms.items()}
        sizes = [0, *(sum(one[i].nbytes for one in cuts.values()) for i in range(count))]
        keys: list[set[str]] = [set()]
        keys += [{f"{member}.{key}" for member, one in cuts.items() for key in one[i].tensors()} for i in range(count)]
        found.bytes[name] = tuple(b - a for a, b in pairwise(sizes))
        found.tensors[name] = tuple(tuple(sorted(b - a)) for a, b in pairwise(keys))
        found.members[name] = members
        for member, one in cuts.items():
            if one[0].shape != one[-1].shape:
                found.shapes[member] = tuple(cut.shape for cut in one)
    return found


def arrange(
    original: Any,
    base: Any,
    form: Callable[[str], Packed | None],
    stacks: Stacks,
    inputs: Tensor,
    order: Order,
    *,
    batch: int,
    shelf: Path,
    once: Once = at_once,
    progress: Progress = quiet,
) -> list[str]:
    """The names of `stacks` in the order in which their parts come, by trials on inputs (count, ...) of the model `base` with `form`
    against the original. Each call of a trial is one stage of the journal."""
    total = sum(len(sizes) - 1 for sizes in stacks.bytes.values())
    done = 0
    held: list[Shelved] = []

    def targets() -> Shelved:
        # the original's predictions are needed only where a trial is left to be made
        if not held:
            held.append(filed(Shelf(shelf, 256 * 1024**2), finished_logits(original, inputs, batch)))
        return held[0]

    calls = 0

    def trial(counts: Mapping[str, int], names: Sequence[str]) -> Sequence[Damage]:
        nonlocal calls, done
        calls += 1
        progress("ordering", done, total, f"one part more of each of {len(names)} matrices")
        made = once(f"order/{calls}", lambda: {"damages": damages(Cut(base, form, counts, stacks), names, inputs, targets(), batch=batch)})
        done += len(names)
        return [Damage(float(made["damages"][name]), UNIT, MEASURED) for name in names]

    found = list(order(stacks.bytes, trial))
    if sorted(found) != sorted(name for name, sizes in stacks.bytes.items() for _ in sizes[1:]):
        raise ValueError(f"{type(order).__name__} does not name every part once")
    for one in held:
        one.shelf.clear()
    return found


def damages(view: Cut, names: Sequence[str], inputs: Tensor, targets: Shelved, *, batch: int) -> dict[str, float]:
    """KL(original || model) in nats a prediction with one part more of each of `names` alone. One segment is in memory at a time; the
    hidden states of as many variants go along as KEPT bytes hold."""
    layers = [segment for segment in view.anatomy.segments() if segment.name]
    # the first site of a layer reads the stream
    room = max(1, KEPT // (4 * inputs.numel() * layers[0].sites[0].matrix[1])) if layers else len(names)
    found: dict[str, float] = {}
    for start in range(0, len(names), room):
        found |= _walked(view, names[start : start + room], inputs, targets, batch)
    return found


def _walked(view: Cut, names: Sequence[str], inputs: Tensor, targets: Shelved, batch: int) -> dict[str, float]:
    walk = Walk(view, inputs, batch=batch)
    walk.begin()
    states: dict[str, list[Tensor]] = {}
    for segment in walk.layers or [walk.rest]:
        module = walk.take(segment)
        entered = walk.hidden

        def passed(hidden: list[Tensor], module: nn.Module = module, segment: Any = segment) -> list[Tensor]:
            walk.hidden = hidden
            return list(walk.outputs(module, segment))

        def more(name: str, module: nn.Module = module, segment: Any = segment) -> nn.Module:
            # the segment with one part more of what lies in it
            wider = {}
            for path, own in module.named_parameters():
                full = f"{segment.name}.{path}" if segment.name else path
                if (stored := view.tied.get(full, full)) in view.stacks.members[name]:
                    value = view.dense(stored, 1)
                    wider[path] = value.reshape(own.shape) if value.numel() == own.numel() else value
            return narrowed(module, wider)

        states = {name: passed(hidden) for name, hidden in states.items()}
        for name in names:
            if view.stacks.members[name][0] in segment.tensors:
                states[name] = passed(entered, more(name))
        walk.hidden = entered
        if segment.name:
            walk.advance(module, segment)
            release(module)
    found = {}
    for name in names:
        walk.hidden = states.pop(name)
        losses = [float(Divergence()(logits, targets[i], None)) * logits.shape[0] for i, logits in enumerate(walk.logits())]
        found[name] = sum(losses) / inputs.shape[0]
    return found


def index_of(stacks: Stacks, order: Sequence[str], whole: int, parameters: int) -> tuple[dict[str, Any], dict[str, int]]:
    """elastic.json, and the slice that each tensor of the file comes with. whole: bytes of all that is stored."""
    ranks: dict[str, int] = {}
    have = dict.fromkeys(stacks.bytes, 1)
    size = whole - sum(stacks.bytes[name][i] for name, sizes in stacks.bytes.items() for i in range(1, len(sizes)))
    least = size
    slices = []
    for number, name in enumerate(order, 1):
        part = have[name]
        have[name] += 1
        size += stacks.bytes[name][part]
        ranks |= dict.fromkeys(stacks.tensors[name][part], number)
        slices.append({"tensor": name, "bytes": size})
    index = {"format": 1, "parameters": parameters, "least": least, "slices": slices}
    together = {name: list(members) for name, members in stacks.members.items() if len(members) > 1}
    return index | ({"together": together} if together else {}), ranks


def spread_over(index: Mapping[str, Any], points: int = 4) -> list[int]:
    """Budgets in bytes between the least and the whole, for the table of a certificate, even in bytes; the whole itself is left out."""
    ends = [int(index["least"]), *(int(one["bytes"]) for one in index["slices"])]
    wished = [ends[0] + (ends[-1] - ends[0]) * i // (points - 1) for i in range(points - 1)]
    return sorted({max(end for end in ends if end <= wish) for wish in wished})
