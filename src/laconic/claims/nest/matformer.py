"""Claims of MatFormer: byte models of four widths learned together against models learned apart, and a trained model that is nested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, Remembering, duel, gathered, judged, measured, on, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Dense, Joined, Packed
from laconic.core.transform import Lesson, Objective
from laconic.elastic import Cut as Narrower
from laconic.elastic import stacks_of
from laconic.methods.nest.order.mixnmatch import MixNMatch
from laconic.methods.nest.width.matformer import MatFormer
from laconic.methods.prune.cut.obspa import Obspa
from laconic.models import open_model
from laconic.narrow import narrowed
from laconic.nesting import nest
from laconic.pipeline import Applied, apply_plan, kept_bytes, learn, quiet, tune_plan
from laconic.recipe import Nesting
from laconic.zoo import corpus

# expansions of 0.5, 1, 2 and 4, as in the paper
WIDTH, LAYERS = 48, 3
HIDDEN = tuple(WIDTH * e // 2 for e in (1, 2, 4, 8))
LENGTH, BATCH = 96, 16
SIZES = tuple(f"{hidden} neurons" for hidden in HIDDEN)


@dataclass(frozen=True)
class NextByte(Objective):
    """Cross-entropy of the next byte; target (b, t) ids."""

    name = "cross-entropy"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())


def lesson(steps: int, odds: tuple[float, ...] = ()) -> MatFormer:
    """The same rate, batches and decay for all."""
    return MatFormer(objective=NextByte(), rates=(("weight", 4e-3),), steps=steps, batch=BATCH, odds=odds)


class Bytes(NamedTuple):
    """Rows of Python source in bytes: to learn from (drawn by a seed) and held out."""

    learn: Tensor
    held: Tensor


@lru_cache(maxsize=1)
def text() -> Bytes:
    """Rows of LENGTH + 1 bytes; what is no ASCII is byte 127."""

    def rows(name: str, count: int) -> Tensor:
        found = "\n".join(one for _, one in corpus.named(name)).encode("ascii", "replace")
        ids = torch.frombuffer(bytearray(found), dtype=torch.uint8).clamp(max=127).long()
        return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)[:count]

    return Bytes(rows("calibrate", 10**6), rows("certify", 256))


def network(hidden: int, seed: int) -> nn.Module:
    """A Llama of three layers for bytes, at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: Any = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128}
    config = LlamaConfig(**sizes, intermediate_size=hidden, max_position_embeddings=LENGTH, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval().requires_grad_(False)  # type: ignore[no-any-return]


# the feed-forward matrices of a layer and the axis along which neurons lie
MATRICES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def sliced(model: nn.Module) -> dict[str, Packed]:
    """Every tensor as it is held: the feed-forward matrices in slices of the four widths."""
    steps = [b - a for a, b in zip((0, *HIDDEN[:-1]), HIDDEN, strict=True)]
    found: dict[str, Packed] = {}
    for name, p in model.named_parameters():
        axis = next((axis for matrix, axis in MATRICES.items() if matrix in name), None)
        found[name] = Dense(p.clone()) if axis is None or max(p.shape) != HIDDEN[-1] else Joined.of(p, steps, axis)
    return found


def narrow_to(model: nn.Module, forms: Mapping[str, Packed], counts: Sequence[int]) -> nn.Module:
    """The model with so many slices in each layer."""
    return narrowed(model, {name: form.first(counts[_layer(name)]).dense() for name, form in forms.items()})


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else 0


def learned(model: nn.Module, forms: Mapping[str, Packed], how: Lesson, seed: int) -> dict[str, Packed]:
    """The forms after their lesson, each batch drawn once."""
    order = torch.randperm(len(text().learn), generator=torch.Generator().manual_seed(seed))
    rows = text().learn[order[: how.steps * BATCH]]
    batches = [part[:, :-1] for part in rows.split(BATCH)]
    made, _ = learn(open_model(model), model, forms, batches, [part[:, 1:] for part in rows.split(BATCH)], how, seed=seed)
    return made


class Said(NamedTuple):
    """What a model says of the held-out rows: loss in nats a byte, and its first choices."""

    loss: float
    choice: Tensor


def said(model: nn.Module) -> Said:
    """Measured on all held-out rows."""
    with torch.inference_mode():
        logits = torch.cat([model(rows[:, :-1]).logits for rows in text().held.split(64)])
    return Said(float(NextByte()(logits, text().held[:, 1:], None)), logits.argmax(-1))


class Family(NamedTuple):
    """Four widths learned together (`nested`, and the models between them by parameters, `mixed`), learned apart (`apart`), and the widest
    of those cut to its best neurons (`cut`). feed: feed-forward parameters of each of `mixed`, ends included."""

    nested: tuple[Said, ...]
    mixed: tuple[Said, ...]
    feed: tuple[int, ...]
    apart: tuple[Said, ...]
    cut: tuple[Said, ...]
    stitched: tuple[Said, ...]


def path() -> list[tuple[int, ...]]:
    """Slices of each layer along Mix'n'Match's order, from the narrowest to the widest."""
    names = [str(layer) for layer in range(LAYERS)]
    have = dict.fromkeys(names, 1)
    found = [tuple(have.values())]
    for name in MixNMatch()(dict.fromkeys(names, HIDDEN), lambda counts, names: ()):
        have[name] += 1
        found.append(tuple(have.values()))
    return found


def _best_first(model: nn.Module) -> nn.Module:
    """Neurons in order of the norms of what they read and write, which changes nothing."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        gate, up, down = (getattr(layer.mlp, name).weight.data for name in MATRICES)
        order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
        gate.copy_(gate[order])
        up.copy_(up[order])
        down.copy_(down[:, order])
    return model


@lru_cache(maxsize=8)
def family(seed: int, steps: int, odds: tuple[float, ...] = ()) -> Family:
    """One seed: four times the steps together (each width is drawn as often as it learns apart), or the widest alone by its odds."""
    model = network(HIDDEN[-1], seed)
    forms = learned(model, sliced(model), lesson(4 * steps, odds), seed)
    steps_of = path()
    mixed = tuple(said(narrow_to(model, forms, counts)) for counts in steps_of)
    feed = tuple(3 * WIDTH * sum(HIDDEN[count - 1] for count in counts) for counts in steps_of)
    alone = [_apart(hidden, seed, steps) for hidden in HIDDEN]
    trained = _best_first(alone[-1])
    ordinary = sliced(trained)
    cut = tuple(said(narrow_to(trained, ordinary, [count] * LAYERS)) for count in range(1, len(HIDDEN) + 1))
    stitched = tuple(said(_stitched(alone, counts)) for counts in steps_of)
    return Family(mixed[::LAYERS], mixed, feed, tuple(said(one) for one in alone), cut, stitched)


@lru_cache(maxsize=16)
def _apart(hidden: int, seed: int, steps: int) -> nn.Module:
    """A model of one width alone, from a start of its own."""
    model = network(hidden, 100 * (seed + 1) + hidden)
    forms = learned(model, {name: Dense(p.clone()) for name, p in model.named_parameters()}, lesson(steps), seed)
    return narrowed(model, {name: form.dense() for name, form in forms.items()})


def _stitched(alone: Sequence[nn.Module], counts: Sequence[int]) -> nn.Module:
    """Layers of models that learned apart, each of the width that is asked for, in the widest one's place."""
    widest = alone[-1]
    taken = {
        f"model.layers.{i}.{path}": p.data
        for i, count in enumerate(counts)
        for path, p in alone[count - 1].model.layers[i].named_parameters()  # type: ignore[union-attr, index]
    }
    return narrowed(widest, taken)


def families(lab: Lab, seeds: Sequence[int], odds: tuple[float, ...] = ()) -> list[Family]:
    """One for each seed."""
    return [family(seed, 100 if lab.quick else 600, odds) for seed in seeds]


# ---- what is checked

WIDEST = (0.0, 0.0, 0.0, 1.0)


def _near(lab: Lab, seeds: Sequence[int], odds: tuple[float, ...]) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    found = families(lab, lab.draws(seeds), odds)
    for i, size in enumerate(SIZES):
        ratio = [one.nested[i].loss / one.apart[i].loss for one in found]
        numbers[f"{size}: loss, nested"] = spread([one.nested[i].loss for one in found], "nats/byte")
        numbers[f"{size}: loss, learned apart"] = spread([one.apart[i].loss for one in found], "nats/byte")
        numbers[f"{size}: loss ratio nested / apart"] = spread(ratio, "")
        if max(ratio) > 1.03:
            wrong.append(f"{size}: the loss is more than 3 % above that of a model of this width alone")
    return judged(wrong, numbers)


def _far(lab: Lab, seeds: Sequence[int], odds: tuple[float, ...]) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    found = families(lab, lab.draws(seeds), odds)
    for i, size in enumerate(SIZES[:-1]):
        numbers[f"{size}: loss, nested"] = spread([one.nested[i].loss for one in found], "nats/byte")
        numbers[f"{size}: loss, cut"] = spread([one.cut[i].loss for one in found], "nats/byte")
        if any(one.nested[i].loss > 0.95 * one.cut[i].loss for one in found):
            wrong.append(f"{size}: the loss is not 5 % below that of an ordinary model cut to its best neurons")
    return judged(wrong, numbers)


def _agree(lab: Lab, seeds: Sequence[int], odds: tuple[float, ...]) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    found = families(lab, lab.draws(seeds), odds)

    def same(a: Said, b: Said) -> float:
        return float((a.choice == b.choice).float().mean())

    for i, size in enumerate(SIZES[:-1]):
        ours, theirs = ([same(models[i], models[-1]) for models in (kind(one) for one in found)] for kind in (_nested, _alone))
        numbers[f"{size}: same first choice as the widest, nested"] = spread(ours, "share")
        numbers[f"{size}: same first choice as the widest, learned apart"] = spread(theirs, "share")
        if any(a <= b for a, b in zip(ours, theirs, strict=True)):
            wrong.append(f"{size}: it agrees with the widest no more often than a model that learned apart")
    return judged(wrong, numbers)


def _nested(one: Family) -> tuple[Said, ...]:
    return one.nested


def _alone(one: Family) -> tuple[Said, ...]:
    return one.apart


# ---- a model that was trained by others

SHARES = (0.125, 0.25, 0.5, 1.0)


def _widths(bench: Bench, seed: int, steps: int, astray: bool) -> list[Found]:
    """The model at each width below the whole: nested, and learned together for so many steps (0: cut to its best neurons)."""

    def make() -> list[Found]:
        work, rows = Remembering(), bench.drawn(seed)
        kept = {"choices": [], "predicted": {"bytes": sum(kept_bytes(bench.source, set()).values())}}
        nesting = Nesting(method="prune.cut.obspa", where="(?!.*(attn|attention)).*", widths=SHARES)
        applied: Applied = apply_plan(bench.source, rows, kept, work=work)
        applied, record = nest(bench.source, rows, applied, nesting, Obspa(), batch=bench.batch, work=work, progress=quiet)
        together = {group["tensors"][0]: group["tensors"] for group in record["groups"]}
        if steps:
            how = MatFormer(steps=steps, batch=2, rates=(("weight", 2e-3),), odds=WIDEST if astray else ())
            applied = tune_plan(bench.source, rows, applied, how, seed=seed, work=work)
        stacks = stacks_of(list(together), applied.view.packed, together)
        found = []
        for count in range(1, len(SHARES)):
            view = Narrower(applied.view, applied.view.packed, dict.fromkeys(stacks.bytes, count), stacks)
            module = view.skeleton()
            view.fill(module, "", torch.float32)
            lost = sum(sum(sizes[count:]) for sizes in stacks.bytes.values())
            found.append(measured(bench, module, applied.bytes - lost))
        return found

    made: list[Found] = bench.once(("matformer", seed if steps else 0, steps, astray), make)
    return made


@gathered
def _after(bench: Bench, steps: int, seeds: Sequence[int], astray: bool) -> Iterator[Duel]:
    for i, share in enumerate(SHARES[:-1]):
        ours = [_widths(bench, seed, steps, astray)[i] for seed in seeds]
        yield duel(f"{share:g} of the neurons", ours, [_widths(bench, 0, 0, False)[i]], names=("nested", "cut"), factor=1.5)


def _trained(name: str, seeds: Sequence[int], astray: bool, lab: Lab) -> Verdict:
    # one draw of few steps is what a quick check of minutes has room for
    return on(lab, name, lambda bench: _after(bench, 48 if lab.quick else 512, seeds[:1] if lab.quick else seeds, astray))


PAPER = "arXiv:2310.07707"
SCALE = (
    f"Llamas of {LAYERS} layers and width {WIDTH} on bytes of Python source, {HIDDEN[0]} to {HIDDEN[-1]} neurons, 100 steps of {BATCH} x "
    f"{LENGTH} bytes for each width (full: 600), four times as many for the nested one, {len(SEEDS)} seeds"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Each of four nested widths is within 3 % of the loss of a model of that width that learned alone for as many steps.",
        where=Paper("Devvrit et al.", 2024, PAPER, "section 4.1, figure 2"),
        scale=SCALE,
        check=partial(_near, seeds=SEEDS, odds=()),
        broken=partial(_near, seeds=ONE, odds=WIDEST),
    ),
    Claim(
        says="Each narrower width has a loss at least 5 % below that of an ordinary model cut to its best neurons.",
        where=Paper("Devvrit et al.", 2024, PAPER, "section 4.1"),
        scale=SCALE,
        check=partial(_far, seeds=SEEDS, odds=()),
        broken=partial(_far, seeds=ONE, odds=WIDEST),
    ),
    Claim(
        says="Narrower nested models choose the widest one's next byte more often than models that learned apart.",
        where=Paper("Devvrit et al.", 2024, PAPER, "section 4.1.1, table 2"),
        scale=SCALE,
        check=partial(_agree, seeds=SEEDS, odds=()),
        broken=partial(_agree, seeds=ONE, odds=WIDEST),
    ),
    Claim(
        says="Nested after its training, each narrower width has at most two thirds of the KL, and a lower perplexity, than when cut.",
        where=Paper("Devvrit et al.", 2024, PAPER, "section 3.2"),
        scale="stories260k on TinyStories, eighths of 1, 2 and 4 of the neurons, 512 steps of 2 rows, 3 draws of the calibration rows "
        "(quick: 48 steps, 1 draw)",
        check=partial(_trained, "stories260k", SEEDS, False),
        broken=partial(_trained, "stories260k", ONE, True),
    ),
)
