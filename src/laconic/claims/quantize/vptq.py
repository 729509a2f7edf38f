"""Claims of VPTQ: each of its steps lowers the error in the same bytes, the whole beats a scalar grid, options pay for what they add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, change, duel, filling, gathered, held, layer_error, measure, on, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.grid.apart import Apart
from laconic.methods.quantize.grid.vectors import Vectored
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.vptq import VPTQ, Codebooks

# about 2 and 3 bits with tables that matrices of that size can pay for
LEVELS = {
    "nano": {2: Codebooks(4, 2, scaled=True), 3: Codebooks(2, 3, scaled=True)},
    "stories260k": {2: Codebooks(2, 2), 3: Codebooks(2, 3)},
}
# one more bit of index, and what options it is compared with
LONGER = {"nano": Codebooks(4, 2.25, scaled=True), "stories260k": Codebooks(2, 2.5)}


@dataclass(frozen=True)
class Told(Transform):
    """VPTQ that is told something else of its inputs. `diagonal`: that they have nothing to do with each other, so that no error is pushed
    on and every vector goes to its nearest entry; `alike`: besides, that all are equally loud, as plain k-means has it. Stand-ins:
    `upside down`, that the loudest are the quietest; `shuffled`, of other channels, so that errors are pushed onto the wrong weights."""

    what: str
    refit: bool = False

    acts_on = (Linear,)
    level = Codebooks
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Codebooks) -> Change:
        gram = stats[Gram()]
        if self.what == "shuffled":
            order = torch.randperm(len(gram), generator=torch.Generator().manual_seed(0))
            gram = gram[order][:, order]
        elif self.what == "alike":
            gram = torch.eye(len(gram))
        else:
            loud = gram.diagonal().clamp(min=1e-12)
            gram = (loud if self.what == "diagonal" else loud.reciprocal()).diag()
        return VPTQ(refit=self.refit)(site, weights, {Gram(): gram}, level)

    def stored(self, site: Site, level: Codebooks) -> int:
        return VPTQ().stored(site, level)


@dataclass(frozen=True)
class Idle(Transform):
    """The stand-in: what an option adds is stored, and is zeros."""

    acts_on = (Linear,)
    level = Codebooks
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Codebooks) -> Change:
        edit = VPTQ()(site, weights, stats, level)
        (form,) = edit.hold.values()
        idle = form.few if isinstance(form, Apart) else form
        assert isinstance(idle, Vectored)
        if isinstance(form, Apart) or level.residual:
            idle.tables()[-1].zero_()
        return edit

    def stored(self, site: Site, level: Codebooks) -> int:
        return VPTQ().stored(site, level)


@gathered
def _step(rival: Transform, names: tuple[str, str], ours: Transform, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    for bits, level in LEVELS[bench.name].items():
        draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
        found, errors = [], []
        for name, transform in zip(names, (ours, rival), strict=True):
            found.append([seen(bench, transform, level, seed) for seed in draws])
            errors.append([layer_error(bench, held(bench, transform, level, seed)) for seed in draws])
            yield [], {f"{bits} bits: error of layers, {name}": spread(errors[-1], "share")}
        yield duel(f"{bits} bits", *found, names=names)
        if any(a >= b for a, b in zip(*errors, strict=True)):
            yield [f"{bits} bits: error of layers, {names[0]}, is not below that of {names[1]}"], {}


def _grids(bits: int, m: int) -> Iterator[Grid]:
    return (Grid(bits, group, scales="log8", zeros="half") for group in range(m, 0, -1))


def _filled(bench: Bench, bits: int, level: Codebooks, seed: int) -> Found:
    """GPTQ with the largest groups that take the bytes of VPTQ or more, matrix by matrix; its grids have scales of 8 bits and zeros in
    halves, and are clipped where that helps."""
    rival = filling(bench, VPTQ(), level, GPTQ(clip=True), partial(_grids, bits))
    found: Found = bench.once(("filled", level, seed), lambda: measure(bench, change(bench, rival, seed)))
    return found


@gathered
def _scalar(transform: Transform, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    for bits, level in LEVELS[bench.name].items():
        draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
        ours = [seen(bench, transform, level, seed) for seed in draws]
        theirs = [_filled(bench, bits, level, seed) for seed in draws]
        yield duel(f"{bits} bits", ours, theirs, names=("vectors", "GPTQ in no fewer bytes"))


@gathered
def _pays(transform: Transform, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    level = LEVELS[bench.name][2]
    options = {"residual": replace(level, bits=level.bits + 1, residual=1), "outliers": replace(level, outliers=0.01)}
    rates: dict[str, list[float]] = {name: [] for name in ("one more bit of index", *options)}
    for seed in seeds if bench.name == "stories260k" or not quick else seeds[:1]:
        base = held(bench, VPTQ(), level, seed)
        size, error = sum(form.nbytes for form in base.values()), layer_error(bench, base)
        for name, changed in (("one more bit of index", LONGER[bench.name]), *options.items()):
            forms = held(bench, VPTQ() if name not in options else transform, changed, seed)
            added = 8 * (sum(form.nbytes for form in forms.values()) - size) / sum(math.prod(form.shape) for form in forms.values())
            rates[name].append(math.log2(error / layer_error(bench, forms)) / 2 / added)
    numbers: dict[str, Measurement] = {f"halvings of the error's root a bit, {name}": spread(found, "") for name, found in rates.items()}
    wrong = []
    for name in options:
        if any(a <= 0 for a in rates[name]):
            wrong.append(f"{name}: the error does not fall")
        elif any(a <= b for a, b in zip(rates[name], rates["one more bit of index"], strict=True)):
            wrong.append(f"{name}: the error falls less for each byte than with one more bit of index")
    yield wrong, numbers


def _on(name: str, check: Callable[..., Verdict], ours: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(check, ours, lab.draws(seeds), lab.quick))


PAPER = Paper("Liu et al.", 2024, "arXiv:2409.17066", "section 4, table 2")
PARTS = Paper("Liu et al.", 2024, "arXiv:2409.17066", "section 4.4, table 3")
SCALES = {
    "nano": "nano, all matrices of the blocks, vectors of 4 with 8 bits and of 2 with 6, a factor a row, 3 draws of the rows (quick: 1)",
    "stories260k": "stories260k on TinyStories, all matrices of the blocks, vectors of 2 with 4 and 6 bits, 3 draws of the rows",
}
UNSOLVED, NEAREST, PLAIN = VPTQ(refit=False), Told("diagonal"), Told("alike")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Tables being as they are, errors pushed on give a lower KL, perplexity and layer error than every vector's nearest entry.",
        where=PARTS,
        scale=SCALES["nano"],
        check=partial(_on, "nano", partial(_step, NEAREST, ("pushed on", "nearest")), UNSOLVED, SEEDS),
        broken=partial(_on, "nano", partial(_step, NEAREST, ("pushed on", "nearest")), Told("shuffled"), ONE),
    ),
    Claim(
        says="Vectors going to their nearest entry, k-means weighted by the Hessian gives a lower KL, perplexity and layer "
        "error than plain.",
        where=PARTS,
        scale=SCALES["nano"],
        check=partial(_on, "nano", partial(_step, PLAIN, ("weighted", "plain")), NEAREST, SEEDS),
        broken=partial(_on, "nano", partial(_step, PLAIN, ("weighted", "plain")), Told("upside down"), ONE),
    ),
    Claim(
        says="Solving for the tables once all indices are there lowers KL, perplexity and layer error.",
        where=PARTS,
        scale=SCALES["nano"],
        check=partial(_on, "nano", partial(_step, UNSOLVED, ("solved for", "as they were")), VPTQ(), SEEDS),
        broken=partial(_on, "nano", partial(_step, UNSOLVED, ("solved for", "as they were")), Told("shuffled", refit=True), ONE),
    ),
    Claim(
        says="At 2 and 3 bits, tables counted, VPTQ has a lower KL and perplexity than GPTQ on a scalar grid in no fewer bytes.",
        where=PAPER,
        scale=SCALES["nano"],
        check=partial(_on, "nano", _scalar, VPTQ(), SEEDS),
        broken=partial(_on, "nano", _scalar, Told("shuffled", refit=True), ONE),
    ),
    Claim(
        says="A residual table, and a finer one for outliers, lower layer error by more for each byte than one more bit of index does.",
        where=PARTS,
        scale=SCALES["nano"],
        check=partial(_on, "nano", _pays, VPTQ(), SEEDS),
        broken=partial(_on, "nano", _pays, Idle(), ONE),
    ),
    Claim(
        says="Tables being as they are, errors pushed on give a lower KL, perplexity and layer error than every vector's "
        "nearest entry, on a model trained by others.",
        where=PARTS,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", partial(_step, NEAREST, ("pushed on", "nearest")), UNSOLVED, SEEDS),
        broken=partial(_on, "stories260k", partial(_step, NEAREST, ("pushed on", "nearest")), Told("shuffled"), ONE),
    ),
    Claim(
        says="Vectors going to their nearest entry, k-means weighted by the Hessian gives a lower KL, perplexity and layer "
        "error than plain, on a model trained by others.",
        where=PARTS,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", partial(_step, PLAIN, ("weighted", "plain")), NEAREST, SEEDS),
        broken=partial(_on, "stories260k", partial(_step, PLAIN, ("weighted", "plain")), Told("upside down"), ONE),
    ),
    Claim(
        says="Solving for the tables once all indices are there lowers KL, perplexity and layer error, on a model trained by others.",
        where=PARTS,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", partial(_step, UNSOLVED, ("solved for", "as they were")), VPTQ(), SEEDS),
        broken=partial(_on, "stories260k", partial(_step, UNSOLVED, ("solved for", "as they were")), Told("shuffled", refit=True), ONE),
    ),
    Claim(
        says="At 2 and 3 bits, tables counted, VPTQ has a lower KL and perplexity than GPTQ on a scalar grid in no fewer "
        "bytes, on a model trained by others.",
        where=PAPER,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", _scalar, VPTQ(), SEEDS),
        broken=partial(_on, "stories260k", _scalar, Told("shuffled", refit=True), ONE),
    ),
    Claim(
        says="A residual table, and a finer one for outliers, lower layer error by more for each byte than one more bit of "
        "index does, on a model trained by others.",
        where=PARTS,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", _pays, VPTQ(), SEEDS),
        broken=partial(_on, "stories260k", _pays, Idle(), ONE),
    ),
)
