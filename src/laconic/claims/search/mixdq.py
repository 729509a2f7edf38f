"""Claims of bits by two measures, on a generator of one step: against one width for all and against either measure alone, at equal bytes.

Content is what an independent classifier reads in the images, quality how far they are from the original's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, Remembering, Reversed, judged, measured, put, spread
from laconic.claims.quantize.dgq import digit_reader
from laconic.claims.search.uniform import allocation
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.menu import Budget, Damage, Judges, Menu, Plan, plan_of
from laconic.core.transform import Objective
from laconic.data import Samples
from laconic.kernels.densities import means
from laconic.kernels.losses import Dissimilarity, Divergence, NoiseToSignal
from laconic.measurement import outputs
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.allocate.uniform import Uniform
from laconic.methods.search.decouple.mixdq import MixDQ
from laconic.models import Source, open_model
from laconic.pipeline import price, quiet, trials
from laconic.recipe import Choice, Recipe
from laconic.zoo import denoiser

# bits of the rivals that have one width for all, whose bytes are the budgets; of ours in the paper
WIDTHS, LEVELS = (3, 4, 5), (2, 4, 8)


def recipe_of(widths: Sequence[int]) -> Recipe:
    """Round to nearest, one scale a row, for every matrix."""
    levels = tuple({"bits": bits, "group": None} for bits in widths)
    return Recipe(name="widths", choices=(Choice(method="quantize.round.rtn(clip=True)", levels=levels, kinds=("linear",)),))


@lru_cache(maxsize=1)
def open_painter(quick: bool) -> Bench:
    """The denoiser as a generator of one step: 256 inputs to draw half of, and 128 (in full 512) to measure on."""
    return painting(open_model("laconic.zoo.denoiser:painter"), 128 if quick else 512)


def painting(source: Source, count: int) -> Bench:
    """A painter on the bench."""
    model = source.load(torch.float32)
    pool, seen = (
        [torch.cat(part) for part in zip(*denoiser.drafts(seed, size, 64, model), strict=True)] for seed, size in ((1, 256), (2, count))
    )
    run = outputs(model)
    with torch.inference_mode():
        logits = tuple(run(batch) for batch in seen[0].split(64))
    return Bench("painter", source, pool[0], Samples(seen[0], seen[1], 1, count, ""), 64, len(pool[0]) // 2, logits)


def pictures(bench: Bench) -> Tensor:
    """What the original paints of the certify part, (count, pixels)."""
    assert bench.certify.targets is not None
    return bench.certify.targets


class Painted(NamedTuple):
    """A changed painter: KL in nats a pixel, squared difference a pixel of its images to the original's, and the share of them that is the
    digit of the caption in a classifier's eyes."""

    kl: float
    image: float
    right: float


def painted(bench: Bench, model: nn.Module, classifier: nn.Module) -> Painted:
    """A model on the certify part."""
    with torch.inference_mode():
        images = torch.cat([means(model(batch)) for batch in bench.certify.inputs.split(bench.batch)])
        right = (classifier(images).argmax(1) == torch.arange(len(images)) % 10).float().mean()
    return Painted(measured(bench, model, 0).kl, float((images - pictures(bench)).square().mean()), float(right))


def opened(bench: Bench, scratch: Path, seed: int, widths: Sequence[int]) -> tuple[Menu, Judges]:
    """The price list from the inputs of a seed, and a judge over the same."""

    def make() -> tuple[Menu, Judges]:
        work, inputs = Remembering(scratch / f"{seed}-{widths}"), bench.drawn(seed)
        rows, _ = price(bench.source, inputs, recipe_of(widths), seed=seed, work=work, progress=quiet, batch=bench.batch, keep=True)
        return Menu(tuple(rows)), trials(bench.source, inputs, Divergence(), work)

    found: tuple[Menu, Judges] = bench.once(("opened", seed, widths), make)
    return found


class Astray(Judges):
    """The stand-in: whatever is measured, the worse a plan is, the better it is said to be."""

    def __init__(self, judge: Judges) -> None:
        self.judge, self.rows = judge, judge.rows

    def by(self, objective: Objective) -> Judges:
        return Astray(self.judge.by(objective))

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        return Reversed(self.judge)(plans, part)


def honest(judge: Judges) -> Judges:
    """The judge as it is."""
    return judge


def by_two(bench: Bench, lab: Lab, spoil: Callable[[Judges], Judges], size: int, seed: int) -> Plan:
    """What MixDQ buys for so many bytes."""
    menu, judge = opened(bench, lab.scratch, seed, LEVELS)
    search = MixDQ(Uniform(), Knapsack())

    def make() -> Plan:
        return search(menu, Budget(size), judge=spoil(judge), rng=torch.Generator().manual_seed(seed), log=lab.log)

    found: Plan = bench.once(("two measures", spoil, size, seed), make)
    return found


def by_one(bench: Bench, lab: Lab, objective: Objective, size: int, seed: int) -> Plan:
    """One integer program over all matrices, by one measure of each alone."""
    menu, judge = opened(bench, lab.scratch, seed, LEVELS)

    def make() -> Menu:
        finest = {row.covers: row for row in menu.rows if row.level["bits"] == max(LEVELS)}
        found = judge.by(objective)([plan_of(menu, [*({**finest, row.covers: row}).values()]) for row in menu.rows])
        least = min(damage.value for damage in found)
        rows = (row._replace(damage=one._replace(value=one.value - least)) for row, one in zip(menu.rows, found, strict=True))
        return Menu(tuple(rows))

    scored: Menu = bench.once(("scored", objective, seed), make)
    return Knapsack()(scored, Budget(size), judge=None, rng=torch.Generator(), log=lab.log)


def uniform(bench: Bench, lab: Lab, size: int, seed: int) -> Plan:
    """The finest width for all that fits."""
    menu, _ = opened(bench, lab.scratch, seed, WIDTHS)
    return Uniform()(menu, Budget(size), judge=None, rng=torch.Generator(), log=lab.log)


def sizes(bench: Bench, lab: Lab, seed: int) -> dict[int, int]:
    """Bytes of each width for all."""
    menu, _ = opened(bench, lab.scratch, seed, WIDTHS)
    return {bits: sum(row.cost.bytes for row in menu.rows if row.level["bits"] == bits) for bits in WIDTHS}


def _held(bench: Bench, plan: Plan, classifier: nn.Module) -> Painted:
    """The painter with a plan's levels."""

    def make() -> Painted:
        choose, model = allocation(plan), bench.source.load(torch.float32)
        forms = {}
        for site in bench.source.anatomy.sites():
            if (found := choose(site)) is not None:
                name = site.tensors["weight"].name
                forms[name] = found[0](site, {"weight": bench.source.read(name).float()}, {}, found[1]).hold[site.tensors["weight"]]
        put(bench, model, forms)
        return painted(bench, model, classifier)

    return bench.once(("held", tuple((row.site, row.level["bits"]) for row in plan.rows)), make)  # type: ignore[no-any-return]


Rival = Callable[[Bench, Lab, int, int], Plan]


def _one(objective: Objective, bench: Bench, lab: Lab, size: int, seed: int) -> Plan:
    return by_one(bench, lab, objective, size, seed)


def _against(name: str, rival: Rival, spoil: Callable[[Judges], Judges], seeds: Sequence[int], lab: Lab) -> Verdict:
    """No fewer right digits and no farther images than the rival in the mean over draws, and better in one of them, at each budget."""
    if lab.data is None or not (Path(lab.data) / "mnist" / "mnist.npz").is_file():
        return Verdict("cannot be checked here", {}, "the real data of MNIST is not here; name its folder with --lab")
    bench, classifier = open_painter(lab.quick), digit_reader(Path(lab.data) / "mnist")
    original = painted(bench, bench.source.load(torch.float32), classifier)
    wrong: list[str] = []
    numbers = {"digits as the caption says, original": Measurement(original.right, "share", 1)}
    for bits in WIDTHS:
        found: dict[str, list[Painted]] = {"two measures": [], name: []}
        for seed in lab.draws(seeds):
            size = sizes(bench, lab, seed)[bits]
            found["two measures"].append(_held(bench, by_two(bench, lab, spoil, size, seed), classifier))
            found[name].append(_held(bench, rival(bench, lab, size, seed), classifier))
        label = f"bytes of {bits} bits"
        for who, all_of in found.items():
            numbers[f"{label}: digits as the caption says, {who}"] = spread([one.right for one in all_of], "share")
            numbers[f"{label}: squared difference of images, {who}"] = spread([one.image for one in all_of], "per pixel")
            numbers[f"{label}: KL, {who}"] = spread([one.kl for one in all_of], "nats/pixel")
        right, far = (
            [numbers[f"{label}: {what}, {who}"].value for who in found]
            for what in ("digits as the caption says", "squared difference of images")
        )
        if right[0] < right[1]:
            wrong.append(f"{label}: fewer digits are right than with {name}")
        if far[0] > far[1]:
            wrong.append(f"{label}: images are farther than with {name}")
        if right[0] == right[1] and far[0] == far[1]:
            wrong.append(f"{label}: no better than {name} in anything")
    return judged(wrong, numbers)


PAPER = Paper("Zhao et al.", 2024, "arXiv:2405.17873", "sections 4.2, 4.3 and 5")
SCALE = (
    "denoiser as a generator of one step, weights of all matrices in 2, 4 or 8 bits, a scale a row, bytes of 3, 4 and 5 bits for all, "
    "3 draws of the 128 inputs that are searched on, 512 images (quick: 128)"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At equal bytes, bits by structure for content layers and by noise for quality layers give no fewer right digits "
        "and no farther images than one width for all, and are better in one of them.",
        where=PAPER,
        scale=SCALE,
        check=partial(_against, "one width", uniform, honest, SEEDS),
        broken=partial(_against, "one width", uniform, Astray, ONE),
    ),
    Claim(
        says="At equal bytes, bits by structure for content layers and by noise for quality layers give no fewer right digits "
        "and no farther images than bits by noise for all, and are better in one of them.",
        where=PAPER,
        scale=SCALE,
        check=partial(_against, "noise alone", partial(_one, NoiseToSignal()), honest, SEEDS),
        broken=partial(_against, "noise alone", partial(_one, NoiseToSignal()), Astray, ONE),
    ),
    Claim(
        says="At equal bytes, bits by structure for content layers and by noise for quality layers give no fewer right digits "
        "and no farther images than bits by structure for all, and are better in one of them.",
        where=PAPER,
        scale=SCALE,
        check=partial(_against, "structure alone", partial(_one, Dissimilarity()), honest, SEEDS),
        broken=partial(_against, "structure alone", partial(_one, Dissimilarity()), Astray, ONE),
    ),
)
