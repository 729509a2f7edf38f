"""Claims of Matryoshka representations: digits, at every prefix against nets of that size alone, PCA, and cutting an ordinary net."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, judged, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Dense, Joined, Packed, Soft
from laconic.core.transform import Objective
from laconic.kernels.retrieval import cascade, nearest
from laconic.methods.nest.vector.mrl import MRL
from laconic.tuning import tune
from laconic.vectors import rotation

# numbers of the embedding, and its nested sizes
WIDTH, HIDDEN, CLASSES = 64, 256, 10
SIZES = (4, 8, 16, 32, 64)
# up to an eighth of the embedding
SHORT = (4, 8)
BATCH = 128


class Right(Objective):
    """Cross-entropy of classes."""

    name = "cross-entropy"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return F.cross_entropy(output, target)


class Digits(NamedTuple):
    """Images (n, 784), normalised, and their classes."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(maxsize=2)
def digits(folder: Path) -> Digits:
    """The first 10,000 images to learn from, 2,000 of the test part."""
    import numpy as np

    with np.load(folder / "mnist" / "mnist.npz") as z:
        images, tests = (torch.from_numpy(z[name][:count]) for name, count in (("train_x", 10_000), ("test_x", 2_000)))
        labels = [torch.from_numpy(z[name][:count]).long() for name, count in (("train_y", 10_000), ("test_y", 2_000))]
    x, test_x = ((part.reshape(len(part), -1).float() / 255 - 0.13) / 0.31 for part in (images, tests))
    return Digits(x, labels[0], test_x, labels[1])


class Learned(NamedTuple):
    """An encoder: hidden layer, embedding matrix (m, hidden), a head for each size."""

    body: nn.Module
    embed: Tensor
    heads: dict[int, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(self.body(x), self.embed)  # type: ignore[no-any-return]


def encoder(folder: Path, sizes: Sequence[int], seed: int, steps: int, shared: bool) -> Learned:
    """Learned on all sizes at once (a single one: an ordinary net). shared: one head, cut with the embedding (MRL-E), else one for each."""
    data, width = digits(folder), sizes[-1]
    torch.manual_seed(1000 * seed + width)
    body = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU())
    cuts = [b - a for a, b in zip((0, *sizes[:-1]), sizes, strict=True)]
    lesson = MRL(objective=Right(), rates=(("weight", 3e-3), ("bias", 3e-3)), steps=steps, batch=BATCH)

    def soft(value: Tensor, axis: int) -> Soft:
        form: Packed = Joined.of(value, cuts, axis) if len(cuts) > 1 else Dense(value)
        found = lesson.soften(form, value)
        assert found is not None
        return found

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    forms: dict[str, nn.Module] = {"body": body, "embed": soft(matrix(width, HIDDEN), 0)}
    own = nn.ModuleDict({} if shared else {str(size): nn.Linear(size, CLASSES, bias=False) for size in sizes})
    if shared:
        forms["head"] = soft(matrix(CLASSES, width), 1)
    else:
        forms["heads"] = own
    order = torch.cat([torch.randperm(len(data.x)) for _ in range(-(-steps * BATCH // len(data.x)))])[: steps * BATCH].split(BATCH)

    def run(i: int, weights: Any) -> Tensor:
        z = F.linear(body(data.x[order[i]]), weights["embed"])
        return F.linear(z, weights["head"]) if shared else own[str(z.shape[1])](z)  # type: ignore[no-any-return]

    tune(run, [data.y[rows] for rows in order], forms, lesson, generator=torch.Generator().manual_seed(seed))
    body.requires_grad_(False)
    embed, head = (form.harden().dense() if isinstance(form, Soft) else None for form in (forms["embed"], forms.get("head")))
    assert embed is not None
    heads = {size: own[str(size)].weight.detach() if head is None else head[:, :size] for size in sizes}  # type: ignore[operator, union-attr]
    return Learned(body, embed, heads)  # type: ignore[arg-type]


def right(data: Digits, train: Tensor, test: Tensor) -> float:
    """Share of test images whose nearest image (cosine of embeddings) is of their class."""
    return float((data.y[nearest(test, train, 1)[:, 0]] == data.test_y).float().mean())


class Scores(NamedTuple):
    """By size: accuracy of the head, and of the nearest neighbour. cut, turned: the neighbour's with the ordinary net's first numbers, and
    after PCA. cascade: accuracy and mean numbers."""

    accuracy: dict[int, float]
    neighbour: dict[int, float]
    alone: dict[int, float]
    alone_neighbour: dict[int, float]
    cut: dict[int, float]
    turned: dict[int, float]
    cascade: tuple[float, float]


@lru_cache(maxsize=16)
def scores(folder: Path, seed: int, steps: int, shared: bool, nested: bool = True) -> Scores:
    """One seed. nested=False: the stand-in, an ordinary net in the nested one's place."""
    data = digits(folder)
    plain = _alone(folder, WIDTH, seed, steps)
    ours = encoder(folder, SIZES, seed, steps, shared) if nested else plain
    heads = {size: ours.heads[size] if nested else plain.heads[WIDTH][:, :size] for size in SIZES}
    train, test = ours(data.x), ours(data.test_x)
    logits = [F.linear(test[:, :size], heads[size]) for size in SIZES]
    alone = {size: _alone(folder, size, seed, steps) for size in SIZES}
    of_plain, of_test = plain(data.x), plain(data.test_x)
    turn = rotation(of_plain).T
    choice, used = cascade(logits, SIZES, 0.97)
    return Scores(
        {size: _share(one.argmax(1), data.test_y) for size, one in zip(SIZES, logits, strict=True)},
        {size: right(data, train[:, :size], test[:, :size]) for size in SIZES},
        {size: _share(F.linear(net(data.test_x), net.heads[size]).argmax(1), data.test_y) for size, net in alone.items()},
        {size: right(data, net(data.x), net(data.test_x)) for size, net in alone.items()},
        {size: right(data, of_plain[:, :size], of_test[:, :size]) for size in SHORT},
        {size: right(data, (of_plain @ turn)[:, :size], (of_test @ turn)[:, :size]) for size in SHORT},
        (_share(choice, data.test_y), float(used.float().mean())),
    )


def _share(choice: Tensor, wanted: Tensor) -> float:
    return float((choice == wanted).float().mean())


@lru_cache(maxsize=32)
def _alone(folder: Path, size: int, seed: int, steps: int) -> Learned:
    return encoder(folder, (size,), seed, steps, False)


def _found(lab: Lab, seeds: Sequence[int], shared: bool, nested: bool) -> list[Scores] | None:
    if lab.data is None or not (Path(lab.data) / "mnist" / "mnist.npz").is_file():
        return None
    return [scores(Path(lab.data), seed, 500 if lab.quick else 2000, shared, nested) for seed in seeds]


ABSENT = Verdict("cannot be checked here", {}, "the real data (mnist) is not here; name its folder with --lab")


def _as_good(lab: Lab, seeds: Sequence[int], shared: bool, nested: bool) -> Verdict:
    if (found := _found(lab, lab.draws(seeds), shared, nested)) is None:
        return ABSENT
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for size in SIZES:
        for what, kinds in (("accuracy", ("accuracy", "alone")), ("nearest neighbour", ("neighbour", "alone_neighbour"))):
            ours, theirs = ([getattr(one, kind)[size] for one in found] for kind in kinds)
            numbers[f"{size} numbers: {what}, nested"] = spread(ours, "share")
            numbers[f"{size} numbers: {what}, alone"] = spread(theirs, "share")
            if statistics.fmean(theirs) - statistics.fmean(ours) > 0.01:
                wrong.append(f"{size} numbers: {what} is more than a point below that of a net of this size alone")
    return judged(wrong, numbers)


# what an ordinary net of all numbers is cut to
RIVALS = {"cut": "the first numbers of an ordinary net", "turned": "PCA of an ordinary net"}


def _better(lab: Lab, seeds: Sequence[int], nested: bool, rival: str) -> Verdict:
    if (found := _found(lab, lab.draws(seeds), False, nested)) is None:
        return ABSENT
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for size in SHORT:
        numbers[f"{size} numbers: nearest neighbour, nested"] = spread([one.neighbour[size] for one in found], "share")
        theirs = [getattr(one, rival)[size] for one in found]
        numbers[f"{size} numbers: nearest neighbour, {RIVALS[rival]}"] = spread(theirs, "share")
        if any(one.neighbour[size] < other + 0.01 for one, other in zip(found, theirs, strict=True)):
            wrong.append(f"{size} numbers: the nearest neighbour is not a point above {RIVALS[rival]}")
    return judged(wrong, numbers)


def _cheaper(lab: Lab, seeds: Sequence[int], shared: bool, nested: bool) -> Verdict:
    if (found := _found(lab, lab.draws(seeds), shared, nested)) is None:
        return ABSENT
    whole = [one.accuracy[WIDTH] for one in found]
    got, used = ([one.cascade[i] for one in found] for i in (0, 1))
    numbers = {
        "accuracy, all numbers": spread(whole, "share"),
        "accuracy, cascade": spread(got, "share"),
        "numbers used, cascade": spread(used, f"of {WIDTH}"),
    }
    wrong = []
    if statistics.fmean(whole) - statistics.fmean(got) > 0.005:
        wrong.append("the cascade is more than half a point below all numbers")
    if max(used) > WIDTH / 4:
        wrong.append("the cascade uses more than a quarter of the numbers")
    return judged(wrong, numbers)


def _paper(section: str) -> Paper:
    return Paper("Kusupati et al.", 2022, "arXiv:2205.13147", section)


SCALE = (
    f"MNIST, 10,000 images, a net of {HIDDEN} hidden units and {WIDTH} numbers, nested {SIZES}, 500 steps of {BATCH} (full: 2,000), 3 seeds"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At every nested size, accuracy and nearest neighbour are within a point of a net of that size alone, heads of their own.",
        where=_paper("section 4.1, figures 2 and 3"),
        scale=SCALE,
        check=partial(_as_good, seeds=SEEDS, shared=False, nested=True),
        broken=partial(_as_good, seeds=ONE, shared=False, nested=False),
    ),
    Claim(
        says="At every nested size, accuracy and nearest neighbour are within a point of a net of that size alone, one head (MRL-E).",
        where=_paper("section 4.1, figures 2 and 3"),
        scale=SCALE,
        check=partial(_as_good, seeds=SEEDS, shared=True, nested=True),
        broken=partial(_as_good, seeds=ONE, shared=True, nested=False),
    ),
    Claim(
        says="Up to an eighth of the numbers, the nearest neighbour is right a point more often than by an ordinary net's first numbers.",
        where=_paper("section 4.1, figures 2 and 3"),
        scale=SCALE,
        check=partial(_better, seeds=SEEDS, nested=True, rival="cut"),
        broken=partial(_better, seeds=ONE, nested=False, rival="cut"),
    ),
    Claim(
        says="Up to an eighth of the numbers, the nearest neighbour is right a point more often than after PCA of an ordinary net.",
        where=_paper("section 4.1, figures 2 and 3"),
        scale=SCALE,
        check=partial(_better, seeds=SEEDS, nested=True, rival="turned"),
        broken=partial(_better, seeds=ONE, nested=False, rival="turned"),
    ),
    Claim(
        says="A cascade over the sizes has the accuracy of all numbers, to half a point, with a quarter of them on average or fewer.",
        where=_paper("section 4.2.1, figure 6"),
        scale=SCALE + "; threshold 0.97",
        check=partial(_cheaper, seeds=SEEDS, shared=False, nested=True),
        broken=partial(_cheaper, seeds=ONE, shared=False, nested=False),
    ),
)
