"""Claims of CBQ: windows against blocks one by one, thin products against a number for each weight; one held grid, so the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, measure, on, seen, spread, tuned
from laconic.claims.quantize.flexround import small
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Soft
from laconic.core.transform import BLOCK, Lesson, Level, Objective, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.losses import SquaredAndDivergence
from laconic.methods.quantize.round.cbq import CBQ
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN

# of steps so few; the best of a few settings of 25 to 100 steps on a first draw, the same for windows and blocks, where thin products and a
# number for each weight had their own
THIN = {"nano": 5e-2, "stories260k": 2e-1}


def ours(name: str) -> CBQ:
    """Of a model."""
    return CBQ(batch=4, rates=(("step", 3e-3), ("a1", THIN[name]), ("a2", THIN[name]), ("v", 1e-1), ("ends", 1e-2)))


def whole(name: str) -> CBQ:
    """A number for each weight."""
    return replace(ours(name), rank=None)


def blocks(name: str) -> CBQ:
    """One by one."""
    return replace(ours(name), scope=BLOCK)


def still(name: str) -> CBQ:
    """Steps of inputs do not learn."""
    return replace(ours(name), rates=tuple((what, rate) for what, rate in ours(name).rates if what != "ends"))


# every grid begins with ranges shrunk to the least squared error of the weights
W2: tuple[Transform, Level] = (RTN(clip=True), Grid(2, 64))
W4A4: tuple[Transform, Level] = (Inputs(RTN(clip=True)), WeightAndInputs(Grid(4, None), 4, step=True))


@dataclass(frozen=True)
class Elsewhere(Objective):
    """The stand-in: every sample must meet what the original gives for another."""

    name = "squared error and KL to another sample"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        # targets are (2, rows, ...): of both inputs
        return SquaredAndDivergence()(output, target.roll(target.shape[1] // 2, 1), mask)


def astray(name: str) -> CBQ:
    """The stand-in."""
    return replace(ours(name), objective=Elsewhere())


Made = Callable[[str], Lesson]


def steps(bench: Bench, quick: bool) -> int:
    """Of each window or block."""
    return {"nano": 20, "stories260k": 100}[bench.name] if quick else {"nano": 30, "stories260k": 150}[bench.name]


def learned(bench: Bench, lesson: Lesson, what: tuple[Transform, Level], seed: int, quick: bool, times: int = 1) -> Found:
    """What a lesson makes of a grid on 64 rows of 128 tokens, measured; made once."""

    def make() -> Found:
        own = replace(small(bench, quick), rows=64)
        return measure(bench, tuned(own, held(bench, *what), replace(lesson, steps=times * steps(bench, quick)), seed))

    found: Found = bench.once(("windows", lesson, what, seed, quick, times), make)
    return found


@gathered
def _below(
    mine: Made,
    rivals: Mapping[str, Made | None],
    what: tuple[Transform, Level],
    times: int,
    seeds: Sequence[int],
    quick: bool,
    bench: Bench,
) -> Iterator[Duel]:
    draws = seeds[:1] if quick else seeds
    found = [learned(bench, mine(bench.name), what, seed, quick) for seed in draws]
    for name, rival in rivals.items():
        theirs = [seen(bench, *what)] if rival is None else [learned(bench, rival(bench.name), what, seed, quick, times) for seed in draws]
        yield duel(f"against {name}", found, theirs, names=("CBQ", name))


def below(
    name: str,
    mine: Made,
    rivals: Mapping[str, Made | None],
    what: tuple[Transform, Level],
    seeds: Sequence[int],
    lab: Lab,
    times: int = 1,
) -> Verdict:
    """A lower KL and perplexity than each of some lessons, of which each part has `times` the steps; None is round to nearest."""
    return on(lab, name, partial(_below, mine, rivals, what, times, lab.draws(seeds), lab.quick))


def count(bench: Bench, lesson: Lesson, what: tuple[Transform, Level]) -> int:
    """Numbers that a lesson learns of all choices, steps of grids apart."""
    total = 0
    for name, form in held(bench, *what).items():
        soft = lesson.soften(form, bench.source.read(name).float().reshape(form.shape))
        assert isinstance(soft, Soft)
        total += sum(p.numel() for path, p in soft.named_parameters() if path.rpartition(".")[2] in ("a1", "a2", "v"))
    return total


@gathered
def _near(mine: Made, share: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    draws = seeds[:1] if quick else seeds
    plain = seen(bench, *W2).kl
    thin, full = ([learned(bench, one, W2, seed, quick).kl for seed in draws] for one in (mine(bench.name), whole(bench.name)))
    kept = [(plain - a) / (plain - b) for a, b in zip(thin, full, strict=True)]
    numbers = {
        "KL, thin products": spread(thin, "nats/token"),
        "KL, a number for each weight": spread(full, "nats/token"),
        "KL, round to nearest": spread([plain], "nats/token"),
        "share of the fall of KL": spread(kept, ""),
        "share of the numbers": spread([count(bench, mine(bench.name), W2) / count(bench, whole(bench.name), W2)], ""),
    }
    yield ([f"thin products have {min(kept):.1%} of the fall of KL"] if min(kept) < share else []), numbers


def near(name: str, mine: Made, share: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """At least so large a share of the fall of KL that a number for each weight brings."""
    return on(lab, name, partial(_near, mine, share, lab.draws(seeds), lab.quick))


def paper(where: str) -> Paper:
    return Paper("Ding et al.", 2023, "arXiv:2312.07950", where)


DRAWS = {
    "stories260k": "stories260k on TinyStories, all matrices of the blocks, 150 steps of 4 rows of 128 tokens for each window or block, "
    "3 draws of 64 rows (quick: 100 steps, 1 draw)",
    "nano": "nano, all matrices of the blocks, 30 steps of 4 rows of 128 tokens for each window or block, 3 draws of 64 rows "
    "(quick: 20 steps, 1 draw)",
}
IN2, IN4 = "2 bits in groups of 64", "weights in 4 bits, one scale a row, inputs in 4 bits, one scale a token"
BY_BLOCKS: dict[str, Made | None] = {"blocks one by one": blocks}
BY_NEAREST: dict[str, Made | None] = {"round to nearest": None}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 2 bits, windows of 2 blocks that overlap have a lower KL and perplexity than blocks one by one, on a model trained "
        "by others.",
        where=paper("section 4, cross-block dependency"),
        scale=f"{DRAWS['stories260k']}; {IN2}",
        check=partial(below, "stories260k", ours, BY_BLOCKS, W2, SEEDS),
        broken=partial(below, "stories260k", astray, BY_BLOCKS, W2, ONE),
    ),
    Claim(
        says="So they have where a block that learns alone gets twice the steps, as many as it gets in two windows.",
        where=paper("section 4, cross-block dependency"),
        scale=f"{DRAWS['stories260k']}; {IN2}; blocks one by one have twice the steps",
        check=partial(below, "stories260k", ours, BY_BLOCKS, W2, SEEDS, times=2),
        broken=partial(below, "stories260k", astray, BY_BLOCKS, W2, ONE, times=2),
    ),
    Claim(
        says="At 2 bits, windows of 2 blocks that overlap have a lower KL and perplexity than blocks one by one.",
        where=paper("section 4, cross-block dependency"),
        scale=f"{DRAWS['nano']}; {IN2}",
        check=partial(below, "nano", ours, BY_BLOCKS, W2, SEEDS),
        broken=partial(below, "nano", astray, BY_BLOCKS, W2, ONE),
    ),
    Claim(
        says="At 2 bits, KL and perplexity are below those of rounding to nearest on the same grid.",
        where=paper("section 4"),
        scale=f"{DRAWS['nano']}; {IN2}",
        check=partial(below, "nano", ours, BY_NEAREST, W2, SEEDS),
        broken=partial(below, "nano", astray, BY_NEAREST, W2, ONE),
    ),
    Claim(
        says="At W4A4, KL and perplexity are below those of blocks one by one and of rounding to nearest on the same grids.",
        where=paper("section 4"),
        scale=f"{DRAWS['stories260k']}; {IN4}",
        check=partial(below, "stories260k", ours, BY_BLOCKS | BY_NEAREST, W4A4, SEEDS),
        broken=partial(below, "stories260k", astray, BY_BLOCKS | BY_NEAREST, W4A4, ONE),
    ),
    Claim(
        says="At W4A4, learning the step of inputs with the rest has a lower KL and perplexity than leaving it.",
        where=paper("section 3"),
        scale=f"{DRAWS['stories260k']}; {IN4}",
        check=partial(below, "stories260k", ours, {"steps of inputs as they are": still}, W4A4, SEEDS),
        broken=partial(below, "stories260k", astray, {"steps of inputs as they are": still}, W4A4, ONE),
    ),
    Claim(
        says="With a few percent of the numbers to learn, thin products bring at least nine tenths of the fall of KL that a number for "
        "each weight brings.",
        where=paper("section 4, LoRA-Rounding"),
        scale=f"{DRAWS['nano']}; {IN2}",
        check=partial(near, "nano", ours, 0.9, SEEDS),
        broken=partial(near, "nano", astray, 0.9, ONE),
    ),
    Claim(
        says="So they do on a model trained by others, whose matrices are so small that rank 5 is an eighth of the numbers.",
        where=paper("section 4, LoRA-Rounding"),
        scale=f"{DRAWS['stories260k']}; {IN2}",
        check=partial(near, "stories260k", ours, 0.9, SEEDS),
        broken=partial(near, "stories260k", astray, 0.9, ONE),
    ),
)
