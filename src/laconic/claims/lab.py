"""What the claims share: real models opened with real data, a method put to their matrices, and the result measured at the output.

Models: nano and mamba on Python's own modules (always there); stories260k on TinyStories and ResNet-20 on CIFAR-10 (where Lab.data is).
Calibration rows are drawn by a seed from the calibration part; the certify part is the same for all and never calibrated on."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from laconic.calibration import Walk, fed, observed, release
from laconic.core.claim import Lab, Measurement, Verdict
from laconic.core.menu import Damage, Judge, Plan
from laconic.core.packed import Packed, Soft
from laconic.core.router import Routed, Router
from laconic.core.site import Anatomy, Conv, Linear, Member, Scale, Site
from laconic.core.state import Ragged, State
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Cut, Lesson, Level, Model, Transform
from laconic.cutting import Reduced, drawn, remove, share, stored_bytes, weigh
from laconic.data import Samples, Texts, open_data
from laconic.kernels.attention import attention
from laconic.kernels.obs import output_error
from laconic.measurement import compare, load_of, outputs
from laconic.models import Derived, Source, open_model
from laconic.pipeline import Parts, Progress, hardened, learn, quiet
from laconic.recipe import Cutting
from laconic.reconstruction import Reconstruction
from laconic.runtime import StateCache
from laconic.zoo import corpus, mamba, nano

SEEDS = (0, 1, 2)
# a claim fails where one draw does, so one draw that fails is enough for a stand-in
ONE = SEEDS[:1]
# rows of text of each part that a quick form takes: a quarter of them where a family's are run side by side
quick_rows: ContextVar[int] = ContextVar("quick_rows", default=16)
# rows that a lesson over a whole model may make of its own
ROOM = 1024
# how much louder planted channels are, and how many
LOUDER, CHANNELS = 16.0, 4
P = ParamSpec("P")
# what is wrong with a comparison, and its numbers
Duel = tuple[list[str], dict[str, Measurement]]
# what happens at a site: a method and how far it goes, or nothing
Choose = Callable[[Site], "tuple[Transform, Level] | None"]


class Found(NamedTuple):
    """A changed model on the certify part: kl and losses (changed, original) in nats a prediction, for a classifier the shares of
    right answers in place of the losses; share of equal first choices; bytes of what the method holds."""

    kl: float
    loss: float
    original: float
    agreement: float
    bytes: int

    @property
    def perplexity(self) -> float:
        """Of the changed model."""
        return math.exp(self.loss)

    @property
    def gap(self) -> float:
        """How much greater the perplexity is than the original's, as a share of it."""
        return math.exp(self.loss - self.original) - 1


@dataclass(frozen=True)
class Bench:
    """An opened model. pool: calibration inputs to draw `rows` from; logits: the original's on the certify part, batch by batch;
    kept: results by key, so that a check and its broken stand-in measure a common baseline once."""

    name: str
    source: Source
    pool: Tensor
    certify: Samples
    batch: int
    rows: int
    logits: tuple[Tensor, ...]
    kept: dict[Any, Any] = field(default_factory=dict)

    def drawn(self, seed: int) -> Tensor:
        """Calibration inputs of a seed, (rows, ...)."""
        order = torch.randperm(self.pool.shape[0], generator=torch.Generator().manual_seed(seed))
        return self.pool[order[: self.rows].sort().values]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def linears(self, transform: Transform, level: Level) -> Choose:
        """The same for every matrix of the blocks (of a network without blocks: for every convolution and linear layer)."""
        layers = {site.name for segment in self.source.anatomy.segments() if segment.name for site in segment.sites}
        return lambda site: (transform, level) if isinstance(site.kind, Linear | Conv) and (not layers or site.name in layers) else None


def filling(bench: Bench, method: Transform, level: Level, rival: Transform, levels: Callable[[int], Iterable[Level]]) -> Choose:
    """The rival for every matrix of the blocks, at the first of its levels for that many columns that takes the method's bytes or more."""

    def choose(site: Site) -> tuple[Transform, Level] | None:
        if bench.linears(method, level)(site) is None:
            return None
        limit = method.stored(site, level)
        return rival, next(one for one in levels(site.matrix[1]) if rival.stored(site, one) >= limit)

    return choose


def on(lab: Lab, name: str, check: Callable[[Bench], Verdict]) -> Verdict:
    """The check on a model, or why it cannot be made."""
    bench = open_bench(name, lab.data, lab.quick)
    if bench is None:
        return Verdict("cannot be checked here", {}, f"the real data of {name} is not here; name its folder with --lab")
    return check(bench)


def judged(wrong: Sequence[str], numbers: Mapping[str, Measurement]) -> Verdict:
    """It holds where nothing is wrong."""
    return Verdict("fails" if wrong else "holds", numbers, "; ".join(wrong))


def spread(values: Sequence[float], unit: str) -> Measurement:
    """Mean, extremes and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Measurement(statistics.fmean(values), unit, len(values), min(values), max(values), deviation)


def turns(runs: Sequence[Callable[[], object]], rounds: int, warm: int = 1) -> list[list[float]]:
    """Seconds that each takes, one after another `rounds` times, so that a slow moment of the machine is nobody's; the first `warm` rounds
    besides do not count."""
    took: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for turn in range(warm + rounds):
            for run, times in zip(runs, took, strict=True):
                began = time.perf_counter()
                run()
                if turn >= warm:
                    times.append(time.perf_counter() - began)
    return took


def swapped(router: Router, kind: type[Routed]) -> Router:
    """A stand-in: the same router, its parts of another class."""

    class Swapped(type(router)):  # type: ignore[misc]
        def place(self, site: Site, anatomy: Anatomy) -> Change:
            placed = super().place(site, anatomy).place
            return Change(place={path: kind.restore(part.describe()) for path, part in placed.items() if isinstance(part, Routed)})

    return Swapped(**{field.name: getattr(router, field.name) for field in fields(router)})  # type: ignore[arg-type]


# ---- models


def open_bench(name: str, data: Path | None, quick: bool) -> Bench | None:
    """nano, mamba, stories260k or resnet20; None where its data is not there. Quick: 16 rows of 512 tokens of each part, or 512 images."""
    return _open_bench(name, data, quick, _rows(quick))


def _rows(quick: bool) -> int:
    return quick_rows.get() if quick else 64


def forget() -> None:
    """Gives back what claims kept with the models that are open."""
    for bench in _OPENED:
        bench.kept.clear()


_OPENED: deque[Bench] = deque(maxlen=3)


@lru_cache(maxsize=3)
def _open_bench(name: str, data: Path | None, quick: bool, rows: int) -> Bench | None:
    bench = _bench_on(name, data, quick)
    if bench is not None:
        _OPENED.append(bench)
    return bench


def _bench_on(name: str, data: Path | None, quick: bool) -> Bench | None:
    if name in ("nano", "mamba"):
        source = open_model(None, default=nano.path() if name == "nano" else mamba.path())
        return bench_of(name, source, None, quick)
    if data is None:
        return None
    if name == "stories260k":
        folder, text = data / "stories260k", data / "text" / "tinystories_1000.jsonl.gz"
        return bench_of(name, open_model(folder), str(text), quick) if folder.is_dir() and text.is_file() else None
    weights, images = data / "resnet_cifar10" / "resnet20.safetensors", data / "cifar10" / "cifar10_10k_1k.npz"
    return _images(name, weights, images, _rows(quick)) if weights.is_file() and images.is_file() else None


def bench_of(name: str, source: Source, spec: str | None, quick: bool) -> Bench:
    """A language model on a text, or on Python's own modules."""
    rows = _rows(quick)
    split = open_data(spec, source, seed=0, limits=(128, 1, rows), default=_texts)
    return _bench(name, source, split.calibrate.inputs, split.certify, 8, rows)


def _texts() -> Texts:
    return Texts(**{part: [text for _, text in corpus.named(part)] for part in corpus.LISTS}, record={})


def _images(name: str, weights: Path, images: Path, rows: int) -> Bench:
    import numpy as np
    from safetensors.torch import load_file

    module = ResNet().eval()
    # the file leaves out how many batches the norms have seen
    module.load_state_dict(load_file(weights), strict=False)
    with np.load(images) as stored:
        train, test, classes = (torch.from_numpy(stored[key]) for key in ("train_x", "test_x", "test_y"))
    source = open_model(module)
    source.trace(normal(train[:2]))
    limit = min(1000, max(256, 32 * rows))
    certify = Samples(normal(test[:limit]), classes[:limit].long(), 1, limit, "")
    return _bench(name, source, normal(train[:2048]), certify, 128, max(128, 16 * rows))


def normal(pixels: Tensor) -> Tensor:
    """(b, 32, 32, 3) uint8 -> (b, 3, 32, 32), normalised as in training."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def _bench(name: str, source: Source, pool: Tensor, certify: Samples, batch: int, rows: int) -> Bench:
    run = outputs(source.load(torch.float32))
    with torch.inference_mode():
        logits = tuple(run(inputs) for inputs in certify.inputs.split(batch))
    return Bench(name, source, pool, certify, batch, rows, logits)


class _Block(nn.Module):
    """Two convolutions and a shortcut that subsamples and pads channels with zeros (option A)."""

    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.stride = width // into
        self.conv1 = nn.Conv2d(into, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            missing = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2): (b, 3, 32, 32) -> (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


# ---- louder channels


# stored tensor -> an axis and a factor for each of its indices
Factors = dict[str, list[tuple[int, Tensor]]]


class Rescaled(Derived):
    """A model with factors along axes of some stored tensors."""

    def __init__(self, original: Source, factors: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        Derived.__init__(self, original)
        self.infos, self.factors = original.infos, factors

    @property
    def anatomy(self) -> Anatomy:
        return self.original.anatomy

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.factors:
            return self.original.read_rows(name, start, stop)
        value = self.original.read(name)
        for axis, by in self.factors[name]:
            value = value * by.to(value.dtype).reshape([-1 if at == axis else 1 for at in range(value.dim())])
        return value[start:stop].clone()

    def skeleton(self) -> nn.Module:
        return self.original.skeleton()


def rescaled(bench: Bench, key: Any, factors: Callable[[Source], Factors]) -> Bench:
    """The bench of a rescaled model, which is the original of what is measured on it; factors are powers of two whose effects cancel."""

    def make() -> Bench:
        return _bench(bench.name, Rescaled(bench.source, factors(bench.source)), bench.pool, bench.certify, bench.batch, bench.rows)

    made: Bench = bench.once(("rescaled", key), make)
    return made


def loud_norms(source: Source, seed: int, *, factor: float, count: int) -> Factors:
    """Of each norm that only matrices read, `count` channels louder, drawn by the seed, and what reads them quieter by as much."""
    generator, found = torch.Generator().manual_seed(seed), Factors()
    folds = [fold for edge in source.anatomy.edges() for fold in edge.folds if fold.readers]
    for fold in folds:
        by = _some(fold.norm.shape[0], generator, factor, count)
        found.setdefault(fold.norm.tensors["weight"].name, []).append((0, by))
        _spread(found, fold.readers, 1 / by)
    return found


def louder(bench: Bench, seed: int) -> Bench:
    """The bench of a model with a few loud channels behind each norm."""
    return rescaled(bench, ("norms", seed), functools.partial(loud_norms, seed=seed, factor=LOUDER, count=CHANNELS))


def as_trained(bench: Bench, seed: int) -> Bench:
    """The bench as it is, where another has loud channels."""
    return bench


def loud_rows(source: Source, seed: int, *, factor: float, count: int) -> Factors:
    """Of each matrix behind which no more than a product with a gate lies, `count` outputs louder, and what reads them quieter."""
    generator, found = torch.Generator().manual_seed(seed), Factors()
    for edge in source.anatomy.edges():
        if (act := edge.may(Scale)) is not None and not act.positive:
            by = _some(edge.width, generator, factor, count)
            _spread(found, edge.writers, by)
            _spread(found, edge.readers, 1 / by)
    return found


def _some(width: int, generator: torch.Generator, factor: float, count: int) -> Tensor:
    by = torch.ones(width)
    by[torch.randperm(width, generator=generator)[:count]] = factor
    return by


def _spread(found: Factors, members: Sequence[Member], by: Tensor) -> None:
    """Factors of an edge's channels at the indices of its members."""
    for member in members:
        along = torch.ones(member.site.shape[member.axis])
        for i, one in enumerate(by.tolist()):
            along[list(member.index(i))] = one
        found.setdefault(member.site.tensors["weight"].name, []).append((member.stored_axis, along))


# ---- change and measure


def change(bench: Bench, choose: Choose, seed: int = 0) -> dict[str, Packed]:
    """Forms by stored name. Methods that want statistics are applied block by block, each stage after the errors of those before it."""
    chosen = {site.name: found for site in bench.source.anatomy.sites() if (found := choose(site)) is not None}
    sites = [site for site in bench.source.anatomy.sites() if site.name in chosen]
    forms: dict[str, Packed] = {}

    def one(site: Site, weight: Tensor, stats: Mapping[Any, Tensor]) -> Packed:
        transform, level = chosen[site.name]
        edit = transform(site, {"weight": weight}, stats, level)
        form = forms[site.tensors["weight"].name] = edit.hold[site.tensors["weight"]]
        return form

    if not any(transform.wants for transform, _ in chosen.values()):
        for site in sites:
            one(site, bench.source.read(site.tensors["weight"].name).float(), {})
        return forms
    walk = Walk(bench.source, bench.drawn(seed), batch=bench.batch)
    walk.begin()
    for segment in walk.layers or (walk.rest,):
        module = walk.take(segment)
        for stage in segment.stages:
            todo = [site for site in stage.sites if site.name in chosen]
            wants = tuple(dict.fromkeys(s for site in todo for s in chosen[site.name][0].wants))
            stats = walk.observe(module, segment, todo, wants) if wants else {}
            for site in todo:
                layer = walk.site_module(module, segment, site)
                weight: Tensor = layer.weight.data  # type: ignore[assignment]
                form = one(site, weight, observed(stats, site, chosen[site.name][0].wants))
                weight.copy_(form.dense().reshape(weight.shape))
                fed(layer, form)
        if segment.name:
            walk.advance(module, segment)
            release(module)
    return forms


def put(bench: Bench, model: nn.Module, forms: Mapping[str, Packed]) -> None:
    """Puts what forms hold in the place of a model's weights; inputs are taken as the forms take them."""
    for name, parameter in model.named_parameters():
        stored = bench.source.tied.get(name, name)
        if stored in forms:
            parameter.data.copy_(forms[stored].dense().reshape(parameter.shape))
            fed(model.get_submodule(name.rpartition(".")[0]), forms[stored])


def measure(bench: Bench, forms: Mapping[str, Packed]) -> Found:
    """The model with these forms in place, on the certify part."""
    model = bench.source.load(torch.float32)
    put(bench, model, forms)
    return measured(bench, model, sum(form.nbytes for form in forms.values()))


def measured(bench: Bench, model: nn.Module, held: int) -> Found:
    """A model of so many bytes on the certify part."""
    original = iter(bench.logits)
    quality = compare(lambda _: next(original), outputs(model), bench.certify, batch=bench.batch)
    kl, loss, before, agreement = (
        float(values.double().mean()) for values in (quality.kl, quality.nll, quality.nll_original, quality.top1)
    )
    return Found(kl, loss, before, agreement, held)


def run(bench: Bench, choose: Choose, seed: int = 0) -> Found:
    """Change and measure."""
    return measure(bench, change(bench, choose, seed))


def held(bench: Bench, transform: Transform, level: Level, seed: int = 0) -> dict[str, Packed]:
    """The same for every matrix of the blocks; made once for each method, level and seed (of methods that look at data)."""
    seed = seed if transform.wants else 0
    found: dict[str, Packed] = bench.once(("held", transform, level, seed), lambda: change(bench, bench.linears(transform, level), seed))
    return found


def seen(bench: Bench, transform: Transform, level: Level, seed: int = 0) -> Found:
    """`held`, measured."""
    key = ("seen", transform, level, seed if transform.wants else 0)
    found: Found = bench.once(key, lambda: measure(bench, held(bench, transform, level, seed)))
    return found


def tuned(bench: Bench, forms: Mapping[str, Packed], lesson: Lesson, seed: int, *, astray: bool = False) -> dict[str, Packed]:
    """The forms learned as the lesson says, on the rows of a seed. astray: every batch must meet the original's predictions for another one
    (of the whole model)."""
    if not isinstance(lesson.scope, Model):
        with tempfile.TemporaryDirectory() as folder:
            view, _ = parted(bench.source, forms, bench.drawn(seed), lesson, seed, Path(folder))
            return {name: form for name in forms if (form := view.packed(name)) is not None}
    return taught(bench, forms, lesson, seed, astray=astray)[0]


def taught(
    bench: Bench,
    forms: Mapping[str, Packed],
    lesson: Lesson,
    seed: int,
    *,
    astray: bool = False,
    progress: Progress = quiet,
    end: Callable[[Soft], Packed] = hardened,
) -> tuple[dict[str, Packed], list[float]]:
    """As `tuned`, of the whole model, and the objective of each step. end: what becomes of each form that has learned."""
    rows = bench.drawn(seed)
    # the original's own weights give the targets; learning puts others in their place
    model = bench.source.load(torch.float32)
    run = outputs(model)
    with torch.inference_mode():
        if bench.source.task == "text":
            predictions = lambda: (run(batch) for batch in rows.split(lesson.batch))  # noqa: E731
            rows = torch.cat([rows, lesson.varied(rows, predictions, ROOM - len(rows), torch.Generator().manual_seed(seed))])
        batches = rows.split(lesson.batch)
        made = [run(batch).half() for batch in batches]
    # outside of inference mode, so that losses may be taken of them
    targets = [logits.clone() for logits in (made[1:] + made[:1] if astray else made)]
    return learn(bench.source, model, forms, batches, targets, lesson, seed=seed, progress=progress, end=end)


class Desk:
    """A work folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {}
        self.kept: dict[str, dict[str, Tensor]] = {}

    def done(self, key: str) -> Any:
        return self.values.get(key)

    def tensors(self, key: str) -> dict[str, Tensor]:
        return self.kept[key]

    def finish(self, key: str, value: Any, tensors: dict[str, Tensor]) -> None:
        self.values[key], self.kept[key] = value, tensors


def parted(source: Source, forms: Mapping[str, Packed], inputs: Tensor, lesson: Lesson, seed: int, folder: Path) -> tuple[Parts, list[Any]]:
    """The forms learned block by block, or layer by layer: where they can be read, and the objective before and after of each part."""
    view, desk = viewed(source, forms, folder)
    job = Reconstruction(source, view, inputs, lesson, seed, desk, quiet)
    job()
    return view, job.errors


def viewed(source: Source, forms: Mapping[str, Packed], folder: Path) -> tuple[Parts, Desk]:
    """The model with these forms in place, as a walk opens it."""
    desk = Desk(folder)
    tensors = {f"{name}.{leaf}": tensor for name, form in forms.items() for leaf, tensor in form.tensors().items()}
    desk.finish("held", {"forms": {name: form.describe() for name, form in forms.items()}, "kept": []}, tensors)
    view = Parts(source, desk)
    view.add("held", desk.done("held"))
    return view, desk


def block_error(bench: Bench, forms: Mapping[str, Packed]) -> float:
    """Squared error of the hidden states behind each block as a share of their squares, the mean over blocks, on the certify part; every
    block is given what the changed ones before it give."""
    view, _ = viewed(bench.source, forms, Path())
    walks = [Walk(opened, bench.certify.inputs, batch=bench.batch) for opened in (view, bench.source)]
    for walk in walks:
        walk.begin()
    shares = []
    for segment in walks[0].layers:
        for walk in walks:
            module = walk.take(segment)
            walk.advance(module, segment)
            release(module)
        ours, theirs = (torch.cat(walk.hidden).double() for walk in walks)
        shares.append(float((ours - theirs).square().sum() / theirs.square().sum()))
    return statistics.fmean(shares)


def site_error(bench: Bench, forms: Mapping[str, Packed]) -> float:
    """As `block_error`, of every changed layer's own output: for a network without blocks."""
    models = [bench.source.load(torch.float32) for _ in range(2)]
    put(bench, models[0], forms)
    sites = [site for site in bench.source.anatomy.sites() if site.tensors["weight"].name in forms]
    seen: list[dict[str, Tensor]] = [{}, {}]
    for model, outs in zip(models, seen, strict=True):
        for site in sites:
            model.get_submodule(site.name).register_forward_hook(
                lambda module, args, output, outs=outs, name=site.name: outs.update({name: output.double()})
            )
    sums = {site.name: [0.0, 0.0] for site in sites}
    for inputs in bench.certify.inputs.split(bench.batch):
        with torch.inference_mode():
            for model in models:
                outputs(model)(inputs)
        for name, total in sums.items():
            total[0] += float((seen[0][name] - seen[1][name]).square().sum())
            total[1] += float(seen[1][name].square().sum())
    return statistics.fmean(error / whole for error, whole in sums.values())


def layer_error(bench: Bench, forms: Mapping[str, Packed]) -> float:
    """Squared output error of the changed layers as a share of their squared output, the mean over layers; inputs are those of the
    original model on the certify part."""
    grams = bench.once("grams", lambda: _grams(bench))
    shares = []
    for site in bench.source.anatomy.sites():
        if (form := forms.get(site.tensors["weight"].name)) is not None:
            weight = bench.source.read(site.tensors["weight"].name).float().reshape(site.matrix)
            error = output_error(form.dense().reshape(site.matrix) - weight, grams[site.name]).double().sum()
            shares.append(float(error / output_error(weight, grams[site.name]).double().sum()))
    return statistics.fmean(shares)


def _grams(bench: Bench) -> dict[str, Tensor]:
    """Gram of each site of the blocks."""
    walk = Walk(bench.source, bench.certify.inputs, batch=bench.batch)
    walk.begin()
    found: dict[str, Tensor] = {}
    for segment in walk.layers or (walk.rest,):
        module = walk.take(segment)
        for stage in segment.stages:
            stats = walk.observe(module, segment, stage.sites, (Gram(),))
            found.update({name: one[Gram()] for name, one in stats.items()})
        if segment.name:
            walk.advance(module, segment)
            release(module)
    return found


def duel(label: str, ours: Sequence[Found], theirs: Sequence[Found], *, names: tuple[str, str], factor: float = 1.0) -> Duel:
    """What is wrong with "ours has a lower KL, by `factor`, and a lower perplexity than theirs, in every seed", and the numbers.
    What has no chance in it is given once."""
    count = max(len(ours), len(theirs))
    pairs = list(zip(*(found if len(found) > 1 else [found[0]] * count for found in (ours, theirs)), strict=True))
    numbers = {}
    for name, found in ((names[0], ours), (names[1], theirs)):
        numbers[f"{label}: KL, {name}"] = spread([one.kl for one in found], "nats/token")
        numbers[f"{label}: perplexity, {name}"] = spread([one.perplexity for one in found], "")
        numbers[f"{label}: bytes, {name}"] = spread([float(one.bytes) for one in found], "bytes")
    numbers[f"{label}: KL ratio {names[1]} / {names[0]}"] = spread([b.kl / a.kl for a, b in pairs], "")
    numbers[f"{label}: same first choice as the original, {names[1]}"] = spread([one.agreement for one in theirs], "")
    wrong = []
    if any(a.kl * factor >= b.kl for a, b in pairs):
        wrong.append(f"{label}: KL of {names[0]} is not below that of {names[1]}" + (f" by {factor:g}" if factor != 1 else ""))
    if any(a.loss >= b.loss for a, b in pairs):
        wrong.append(f"{label}: perplexity of {names[0]} is not below that of {names[1]}")
    return wrong, numbers


def gathered(check: Callable[P, Iterable[Duel]]) -> Callable[P, Verdict]:
    """A check that yields what each of its duels came to, as one verdict; it may yield further numbers beside an empty list."""

    @functools.wraps(check)
    def whole(*args: P.args, **kwargs: P.kwargs) -> Verdict:
        wrong: list[str] = []
        numbers: dict[str, Measurement] = {}
        for said, found in check(*args, **kwargs):
            wrong += said
            numbers |= found
        return judged(wrong, numbers)

    return whole


# ---- searches that measure


class Remembering:
    """A journal in memory, for what is tried and thrown away."""

    def __init__(self, folder: Path = Path()) -> None:
        self.folder = folder
        self.kept: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}

    def done(self, key: str) -> dict[str, Any] | None:
        """The value of a finished stage."""
        return self.kept[key][0] if key in self.kept else None

    def finish(self, key: str, value: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Kept as it is."""
        self.kept[key] = value, tensors or {}

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished stage."""
        return self.kept[key][1]


class Reversed(Judge):
    """The stand-in: the worse a plan is, the better it is said to be."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.rows = judge, judge.rows

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        return [damage._replace(value=-damage.value) for damage in self.judge(plans, part)]


def honest(judge: Judge) -> Judge:
    """The judge as it is."""
    return judge


# ---- cuts


class Smaller(NamedTuple):
    """A cut model on the certify part; multiplications of one input, and of the original for it."""

    found: Found
    multiplications: int
    original: int


def cut(bench: Bench, method: Cut, keep: float, seed: int, inputs: Literal["data", "noise"], norms: bool = True) -> Smaller:
    """The model with as many channels gone of each group as leave it `keep` of its bytes, so that all methods cut the same shapes; what is
    looked at is drawn by the seed, and norms move by it where they are to, whatever the method."""

    def make() -> Smaller:
        reduced = narrowed(bench, method, keep, seed, inputs, norms)
        model = reduced.load(torch.float32)
        one = bench.certify.inputs[:1]
        before = multiplications(bench.source.load(torch.float32), one)
        return Smaller(measured(bench, model, stored_bytes(bench.source, reduced.shapes)), multiplications(model, one), before)

    made: Smaller = bench.once(("cut", method, keep, seed, inputs, norms), make)
    return made


def narrowed(bench: Bench, method: Cut, keep: float, seed: int, inputs: Literal["data", "noise"], norms: bool = True) -> Reduced:
    """As `cut`, opened."""
    # the methods are given; the name is for plans
    cutting = Cutting(method="prune.cut.obspa", inputs=inputs, norms=norms)
    seen, work, size = drawn(bench.source, bench.drawn(seed), cutting, seed), Remembering(), bench.batch
    weighed = weigh(bench.source, seen, cutting, method, batch=size, work=work, progress=quiet)
    gone = share(bench.source, weighed, int(keep * stored_bytes(bench.source, {})), even=True)
    return remove(bench.source, seen, cutting, method, weighed.groups, gone, batch=size, prefix="cut", work=work, progress=quiet)


def multiplications(model: nn.Module, inputs: Tensor) -> int:
    """With weights, for each row of the inputs."""
    return round(load_of(model, [inputs], "rows")[0].dense)


# ---- caches


class Continued(NamedTuple):
    """What a model said of the tokens after a prompt, its past held by a State: nll (rows, new tokens) in nats; bytes and bits a number of
    the State at the end."""

    nll: Tensor
    bytes: int
    bits: float


@dataclass(eq=False)
class Misread(State):
    """A stand-in: what `inner` keeps, its parts of a name that holds `which` read one token late."""

    inner: State
    which: str

    def keep(self, kept: Mapping[str, Ragged] | None, new: tuple[Ragged, ...]) -> Mapping[str, Ragged]:
        return self.inner.keep(kept, new)

    def read(self, kept: Mapping[str, Ragged] | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        late = {
            name: Ragged.kept(part.data.roll(1, 2), part.lengths) if self.which in name else part for name, part in (kept or {}).items()
        }
        return self.inner.read(late or None, staged)

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        keys, values = self.seen(layer)
        return attention(query, keys.data, values.data, keys.lengths, mask, scale)


# of a layer's number, queries, keys and values, as positions have turned them, what attention gets
Attended = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@contextmanager
def attending(model: nn.Module, change: Attended) -> Iterator[None]:
    """Queries, keys and values of each layer changed on their way to attention."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *change(module.layer_idx, query, key, value), *args, **kwargs)

    config: Any = model.config
    before = config._attn_implementation
    AttentionInterface.register("laconic-claims", attend)
    AttentionMaskInterface.register("laconic-claims", sdpa_mask)
    config._attn_implementation = "laconic-claims"
    try:
        yield
    finally:
        config._attn_implementation = before


@lru_cache(maxsize=1)
def long_text() -> tuple[nn.Module, Tensor]:
    """nano in fp32 and the certify part in rows of its whole context, 2,048 tokens, in an order drawn by a seed."""
    source = open_model(None, default=nano.path())
    rows = open_data(None, source, seed=0, length=2048, limits=(1, 1, 64), default=_texts).certify.inputs
    return source.load(torch.float32), rows[torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))]


def continued(make: Callable[[], State], rows: Tensor, prompt: int, piece: int = 1, model: nn.Module | None = None) -> Continued:
    """A prefill of `prompt` tokens, then the rest of each row in pieces: token by token, as decoding reads its cache, or more at once,
    which is faster, and the tokens of a piece read each other as they are. model: nano unless told."""
    model = long_text()[0] if model is None else model
    cache = StateCache(model, make())
    logits = []
    with torch.inference_mode():
        logits.append(model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1).logits)
        # the last token predicts nothing that is here
        for part in rows[:, prompt:-1].split(piece, 1):
            logits.append(model(part, past_key_values=cache).logits)
    nll = F.cross_entropy(torch.cat(logits, 1).float().flatten(0, 1), rows[:, prompt:].flatten(), reduction="none")
    return Continued(nll.reshape(rows.shape[0], -1), cache.state.nbytes, cache.state.bits_per_number)
