"""What to calibrate on, found by trying: one plan carried out with calibration data of other amounts, other lengths and other origin, each
result measured on held-out text of the kind that the model is for.

The plan stays the same, so that nothing but the data differs; what the recipe would tune afterwards is left out. Measured is on the search
part: the certify part stays unseen, for the run that follows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from laconic.core.errors import UserError
from laconic.core.site import Embedding
from laconic.cutting import noise
from laconic.data import Split
from laconic.job import pointwise
from laconic.journal import Work
from laconic.kernels.divergence import Interval, bootstrap_mean
from laconic.kernels.place import CPU, on
from laconic.models import Source
from laconic.pipeline import Log, Progress, apply_plan, batch_of, calibration_rows, make_plan, quiet
from laconic.recipe import Recipe

# fewer rows, and rows of fewer tokens, are not tried
FEWEST, SHORTEST = 4, 32
OWN = "own"
Axis = Literal["rows", "length", "data"]


class Variant(NamedTuple):
    """Calibration inputs to try (count, ...): along which axis they differ from all rows of the own data, and whose they are."""

    axis: Axis
    data: str
    inputs: Tensor


class Tried(NamedTuple):
    """What a variant came to: KL to the original in nats a prediction, and how much more that is than with all rows of the own data, each
    with its 95 % interval (that of the second from the same predictions, sequence by sequence); length: tokens a row, 0 where there are
    none; seconds of calibration, rounding and measuring."""

    axis: Axis
    data: str
    rows: int
    length: int
    kl: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float
    seconds: float

    @property
    def costs(self) -> bool:
        """Whether it is worse than all rows of the own data, and not by chance."""
        return self.more_low > 0


def variants(source: Source, inputs: Tensor, others: Mapping[str, Tensor], seed: int = 0) -> Iterator[Variant]:
    """All rows of the own data first; then half of them, a quarter and so on, evenly taken; the same tokens in rows half, a quarter ... as
    long; as many rows of other data; and noise, which is no data at all. inputs (count, length) of ids, or (count, ...) of images."""
    yield Variant("rows", OWN, inputs)
    count = inputs.shape[0] // 2
    while count >= FEWEST:
        yield Variant("rows", OWN, spread(inputs, count))
        count //= 2
    if not inputs.is_floating_point() and inputs.dim() == 2:
        length = inputs.shape[1] // 2
        while length >= SHORTEST:
            yield Variant("length", OWN, inputs[:, : inputs.shape[1] // length * length].reshape(-1, length))
            length //= 2
    for name, other in others.items():
        yield Variant("data", name, spread(other, min(len(other), len(inputs))))
    if inputs.is_floating_point() or next(source.anatomy.sites(Embedding), None) is not None:
        yield Variant("data", "noise", noise(source, inputs, seed))


def spread(inputs: Tensor, count: int) -> Tensor:
    """So many rows of inputs, evenly taken."""
    return inputs[torch.linspace(0, inputs.shape[0] - 1, count).round().long()]


def advise(
    source: Source,
    split: Split,
    others: Mapping[str, Tensor],
    *,
    recipe: Recipe,
    budget: Sequence[str],
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    log: Log = print,
) -> list[Tried]:
    """Each variant tried, in order. others: rows of further data by name, as many tokens long as the own."""
    if any(stage is not None for stage in (recipe.cut, recipe.align, recipe.restore, recipe.nest, recipe.route, recipe.order)):
        raise UserError(f"recipe {recipe.name} does more than round, which is not tried with other data yet; take gptq, or auto")
    if not recipe.choices:
        raise UserError(f"recipe {recipe.name} rounds nothing, so no calibration data make a difference to it; take gptq, or auto")
    found: list[Tried] = []
    first: Tensor | None = None
    plan = None
    with on(device), tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
        for number, (axis, name, inputs) in enumerate(variants(source, calibration_rows(source, split), others, seed)):
            began = time.monotonic()
            with Work(Path(scratch) / f"{number}", {}) as work:
                plan = plan or make_plan(source, split, recipe, budget, seed=seed, work=work, progress=progress, log=log)
                applied = apply_plan(source, inputs, plan, work=work, progress=progress)
                progress("measuring", 0, 1, "held-out data")
                rows = pointwise(source, applied.view, split.search, batch=batch_of(source)).kl.mean(1)
                work.discard()
            first = rows if first is None else first
            with on(CPU):
                kl, more = (_spread(values, seed) for values in (rows, rows - first))
            length = 0 if inputs.is_floating_point() else inputs.shape[1]
            found.append(Tried(axis, name, inputs.shape[0], length, *kl, *more, round(time.monotonic() - began, 1)))
            log(line(found[-1]))
    return found


def _spread(values: Tensor, seed: int) -> tuple[float, float, float]:
    """Mean of values (sequences,) and the ends of its interval; of a single sequence the mean alone, thrice."""
    mean = float(values.mean())
    ends = bootstrap_mean(values, seed=seed) if len(values) > 1 else Interval(mean, mean)
    return mean, ends.low, ends.high


def called(data: str) -> str:
    """Whose data a variant has, in words."""
    return "your data" if data == OWN else data


def line(one: Tried) -> str:
    """What was tried, in a line."""
    size = f"{one.rows} x {one.length} tokens" if one.length else f"{one.rows} samples"
    return f"{called(one.data)}, {size}: KL {one.kl:.4g} ({one.low:.4g} to {one.high:.4g}), {one.seconds:.0f} s"


def words(found: Sequence[Tried]) -> list[str]:
    """The advice: what the figures say, in sentences. What the same predictions cannot tell apart is called no difference."""
    whole = found[0]
    unit = "rows" if whole.length else "samples"
    # half of the rows first
    parts = [one for one in found[1:] if one.axis == "rows"]
    said = []
    if fewer := list(takewhile(lambda one: not one.costs, parts)):
        said.append(f"{fewer[-1].rows} {unit} do as well as all {whole.rows}: KL {fewer[-1].kl:.4g} against {whole.kl:.4g}.")
    elif parts:
        said.append(
            f"All {whole.rows} {unit} are of use, and more may be: KL {whole.kl:.4g}, with {parts[0].rows} of them {parts[0].kl:.4g}."
        )
    if lengths := [one for one in found if one.axis == "length"]:
        worst, best = max(lengths, key=lambda one: one.kl), min(lengths, key=lambda one: one.kl)
        if worst.costs:
            said.append(
                f"Rows should be as long as the texts that the model is for: cut to {worst.length} tokens a row KL is {worst.kl:.4g}, "
                f"{worst.kl / whole.kl:.2f} times that of {whole.length}."
            )
        elif best.more_high < 0:
            said.append(f"Shorter rows are better here: cut to {best.length} tokens KL is {best.kl:.4g} against {whole.kl:.4g}.")
        else:
            said.append(f"The length of a row makes no difference: cut to {worst.length} tokens KL is {worst.kl:.4g}.")
    for one in (one for one in found if one.axis == "data"):
        name = "Noise, which needs no data," if one.data == "noise" else one.data
        if one.costs:
            said.append(f"{name} costs {one.kl / whole.kl:.2f} times the KL of your data: {one.kl:.4g}.")
        elif one.more_high < 0:
            said.append(f"{name} is better than your data: KL {one.kl:.4g} against {whole.kl:.4g}.")
        else:
            said.append(f"{name} serves as well as your data: KL {one.kl:.4g}.")
    return said
