"""Claims of AWQ: a scale goes into what is there already, so all of these have the same grid and the same bytes.

Small models have no loud channels, so some are made loud: four entries of each norm before attention and feed-forward, drawn by the seed
(all matrices behind it take the inverse, and the function stays)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from laconic.aligning import align
from laconic.claims.lab import (
    ONE,
    SEEDS,
    Bench,
    Duel,
    Found,
    Remembering,
    bench_of,
    change,
    duel,
    gathered,
    measure,
    on,
    quiet,
)
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Edge, Norm, Site
from laconic.core.statistic import Statistic
from laconic.core.transform import Align, Change, Level, Stats, Stretched, Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.clipped import Clipped
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.awq import AWQ
from laconic.models import open_model
from laconic.recipe import Aligning

LOUDER, CHANNELS = 16.0, 4
LEVELS = (Grid(4, 64), Grid(3, 64))


@dataclass(frozen=True)
class Inverted(Align):
    """A stand-in: the same factors the wrong way round, so that loud channels get smaller weights."""

    ours: Align

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        return self.ours.looks(edge)

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        found = self.ours(edge, read, stats)
        return replace(found, move=tuple((at, Stretched(1 / move.factors)) for at, move in found.move if isinstance(move, Stretched)))


# ---- models


def loud(bench: Bench, lab: Lab, seed: int) -> Bench:
    """The model with a few channels behind each norm scaled up, drawn by the seed; it is the original of what is measured on it."""

    def make() -> Bench:
        source = bench.source
        model = source.load(torch.float32)
        own = {source.tied.get(name, name): parameter.data for name, parameter in model.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        for edge in source.anatomy.edges():
            norms = [member.site for member in edge.writers if isinstance(member.site.kind, Norm) and "layer" in member.site.context]
            chosen = torch.randperm(edge.width, generator=generator)[:CHANNELS] if norms else torch.empty(0, dtype=torch.long)
            for norm in norms:
                own[norm.tensors["weight"].name][chosen] *= LOUDER
                for reader in edge.readers:
                    own[reader.site.tensors["weight"].name][:, chosen] /= LOUDER
        # as long as the bench: the scratch folder of a lab is one claim's
        home = bench.once("loud folders", lambda: tempfile.TemporaryDirectory(prefix="laconic-"))
        folder = Path(home.name) / str(seed)
        model.save_pretrained(folder)  # type: ignore[operator]
        assert source.path is not None
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (Path(source.path) / name).is_file():
                shutil.copy(Path(source.path) / name, folder)
        text = None if bench.name == "nano" or lab.data is None else str(lab.data / "text" / "tinystories_1000.jsonl.gz")
        return bench_of(bench.name, open_model(folder), text, lab.quick)

    made: Bench = bench.once(("loud", seed), make)
    return made


def trained(bench: Bench, lab: Lab, seed: int) -> Bench:
    """The model as it is."""
    return bench


Where = Callable[[Bench, Lab, int], Bench]


# ---- rewritten and rounded


def rewritten(bench: Bench, how: Align | None, seed: int) -> Bench:
    """A bench whose model was rewritten along its edges, on the rows of a seed; the original's logits stay what it is compared with."""

    def make() -> Bench:
        if how is None:
            return bench
        named = Aligning(method="quantize.smooth.awq")
        aligned = align(bench.source, bench.drawn(seed), named, how, batch=bench.batch, work=Remembering(), progress=quiet)
        return replace(bench, source=aligned, kept={})

    made: Bench = bench.once(("rewritten", how, seed), make)
    return made


def compressed(bench: Bench, how: Align | None, method: Transform, level: Level, seed: int) -> Found:
    """The blocks' matrices after a rewriting, all at one level, on the certify part."""

    def make() -> Found:
        own = rewritten(bench, how, seed)
        return measure(own, change(own, own.linears(method, level), seed))

    found: Found = bench.once(("compressed", how, method, level, seed if how is not None or method.wants else 0), make)
    return found


# ---- checks

# what is done before and what rounds
Way = tuple[Align | None, Transform]


@gathered
def _against(bench: Bench, lab: Lab, where: Where, ours: Way, theirs: Way, names: tuple[str, str], seeds: Sequence[int]) -> Iterator[Duel]:
    for level in LEVELS:
        found = [[compressed(where(bench, lab, seed), *_at(way, level), level, seed) for seed in seeds] for way in (ours, theirs)]
        yield duel(f"{level.bits} bits in groups of {level.group}", found[0], found[1], names=names)


def _at(way: Way, level: Grid) -> Way:
    """The search on the grid that rounds."""
    how, method = way
    if isinstance(how, AWQ):
        return replace(how, bits=level.bits, group=level.group), method
    if isinstance(how, Inverted) and isinstance(how.ours, AWQ):
        return Inverted(replace(how.ours, bits=level.bits, group=level.group)), method
    return way


def against(model: str, where: Where, ours: Way, theirs: Way, names: tuple[str, str], seeds: Sequence[int], lab: Lab) -> Verdict:
    """One way against another, at 4 and 3 bits."""
    return on(lab, model, lambda bench: _against(bench, lab, where, ours, theirs, names, lab.draws(seeds)))


PAPER = Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 5, tables 2 and 4")
SCALES = Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 3.2, table 2")
SCALE = "stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits in groups of 64, 3 draws of the calibration rows"
LOUD = f"{SCALE}; {CHANNELS} channels behind each norm {LOUDER:g} times as loud, drawn by the seed"
OURS, ASTRAY = AWQ(), Inverted(AWQ())
RANGES = RTN(clip=True)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud channels, AWQ's KL and perplexity are below those of rounding to nearest with the same search for ranges.",
        where=PAPER,
        scale=LOUD,
        check=partial(against, "stories260k", loud, (OURS, Clipped()), (None, Clipped()), ("AWQ", "ranges cut by the output alone"), SEEDS),
        broken=partial(against, "stories260k", loud, (ASTRAY, Clipped()), (None, Clipped()), ("AWQ", "ranges alone"), ONE),
    ),
    Claim(
        says="On the model as trained, AWQ's KL and perplexity are below those of rounding to nearest with the same search for ranges.",
        where=PAPER,
        scale=SCALE,
        check=partial(
            against, "stories260k", trained, (OURS, Clipped()), (None, Clipped()), ("AWQ", "ranges cut by the output alone"), SEEDS
        ),
        broken=partial(against, "stories260k", trained, (ASTRAY, Clipped()), (None, Clipped()), ("AWQ", "ranges alone"), ONE),
    ),
    Claim(
        says="With loud channels, the scales alone have a lower KL and perplexity than rounding to nearest.",
        where=SCALES,
        scale=LOUD,
        check=partial(against, "stories260k", loud, (OURS, RTN()), (None, RTN()), ("scales", "round to nearest"), SEEDS),
        broken=partial(against, "stories260k", loud, (ASTRAY, RTN()), (None, RTN()), ("scales", "round to nearest"), ONE),
    ),
    Claim(
        says="On the model as it was trained, the scales alone have a lower KL and perplexity than rounding to nearest.",
        where=SCALES,
        scale=SCALE,
        check=partial(against, "stories260k", trained, (OURS, RTN()), (None, RTN()), ("scales", "round to nearest"), SEEDS),
        broken=partial(against, "stories260k", trained, (ASTRAY, RTN()), (None, RTN()), ("scales", "round to nearest"), ONE),
    ),
    Claim(
        says="With loud channels, GPTQ after AWQ's scales has a lower KL and perplexity than GPTQ alone: the two add up.",
        where=Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 5.2, table 9"),
        scale=LOUD,
        check=partial(against, "stories260k", loud, (OURS, GPTQ()), (None, GPTQ()), ("AWQ and GPTQ", "GPTQ"), SEEDS),
        broken=partial(against, "stories260k", loud, (ASTRAY, GPTQ()), (None, GPTQ()), ("AWQ and GPTQ", "GPTQ"), ONE),
    ),
)
