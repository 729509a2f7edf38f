"""Claims of MambaQuant, on the small Mamba of the zoo: the rotation of QuaRot and plain rounding have the same grids, so the same bytes.

Training left next to no loud channels in it, so some are made loud: of each layer four channels of the norm (the projection behind it takes
the inverse, and the function stays) and four of the convolution (so do the two projections that read it, and what comes of it is the
original of what is measured)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from laconic.aligning import Aligned, align, difference
from laconic.calibration import Walk, fed, release
from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, Remembering, bench_of, gathered, measured, open_bench, quiet, spread
from laconic.core.claim import Claim, Lab, Paper
from laconic.core.part import Part
from laconic.core.site import Edge, Site
from laconic.core.statistic import Gram, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched, Transform, Turned
from laconic.kernels.grids import Grid
from laconic.kernels.hadamard import unhadamard
from laconic.methods.quantize.rotate.hadamard import Hadamard
from laconic.methods.quantize.rotate.mambaquant import MambaQuant
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.models import open_model
from laconic.recipe import Aligning
from laconic.zoo import mamba

OURS = MambaQuant()
TURNED, PLAIN = MambaQuant(basis="hadamard", smooth=False), MambaQuant(basis="none", smooth=False)
LOUDER, CHANNELS = 16.0, 4
# bits of weights and of inputs
W8A8, W4A8, W8A6 = (8, 8), (4, 8), (8, 6)


@dataclass(frozen=True)
class Unspread(Align):
    """A stand-in: the basis without the Hadamard matrix, which leaves all variance in few channels, and factors the wrong way round."""

    ours: MambaQuant = OURS

    def opens(self, edge: Edge) -> Mapping[str, Part]:
        return self.ours.opens(edge)

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        return self.ours.looks(edge)

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        change = self.ours(edge, read, stats)
        moves = ((at, Turned(unhadamard(m.matrix)) if isinstance(m, Turned) else _inverse(m)) for at, m in change.move)  # type: ignore[arg-type]
        return replace(change, move=tuple(moves))


def _inverse(move: Stretched) -> Stretched:
    return Stretched((1 / move.factors).to(torch.bfloat16).float())


# ---- models


def _loud(lab: Lab, seed: int) -> Bench:
    """The small Mamba with a few channels scaled up, drawn by the seed; it is the original of what is measured on it."""
    bench = _trained(lab)

    def make() -> Bench:
        model = bench.source.load(torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.backbone.layers:  # type: ignore[union-attr]
                norm, mixer = layer.norm.weight, layer.mixer  # type: ignore[union-attr]
                loud = torch.randperm(norm.shape[0], generator=generator)[:CHANNELS]
                norm[loud] *= LOUDER
                mixer.in_proj.weight[:, loud] /= LOUDER
                few = torch.randperm(mixer.D.shape[0], generator=generator)[:CHANNELS]
                for tensor in (mixer.conv1d.weight, mixer.conv1d.bias):
                    tensor[few] *= LOUDER
                for tensor in (mixer.x_proj.weight, mixer.out_proj.weight):
                    tensor[:, few] /= LOUDER
        # as long as the bench: the scratch folder of a lab is one claim's
        home = bench.once("loud folders", lambda: tempfile.TemporaryDirectory(prefix="laconic-"))
        folder = Path(home.name) / str(seed)
        model.save_pretrained(folder)  # type: ignore[operator]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(mamba.path() / name, folder)
        return bench_of("mamba", open_model(folder), None, lab.quick)

    made: Bench = bench.once(("loud", seed), make)
    return made


def _trained(lab: Lab, seed: int = 0) -> Bench:
    """The small Mamba as it is."""
    bench = open_bench("mamba", lab.data, lab.quick)
    assert bench is not None
    return bench


# ---- rewritten and rounded


def _rewritten(bench: Bench, how: Align, seed: int) -> Aligned:
    def make() -> Aligned:
        named = Aligning(method="quantize.rotate.mambaquant")
        return align(bench.source, bench.drawn(seed), named, how, batch=bench.batch, work=Remembering(), progress=quiet)

    made: Aligned = bench.once(("rewritten", how, _drawn(how, seed)), make)
    return made


def _drawn(how: Align, seed: int) -> int:
    """The seed where calibration rows are looked at; they are not without smoothing and a basis of data."""
    return seed if not isinstance(how, MambaQuant) or how.smooth or how.basis == "klt" else 0


def _bits(how: Align, inputs: int) -> Align:
    """The method with operands of the scan in as many bits as inputs."""
    return replace(how, ours=replace(how.ours, scan=inputs)) if isinstance(how, Unspread) else replace(how, scan=inputs)  # type: ignore[type-var]


def _rounded(bench: Bench, how: Align, bits: tuple[int, int], seed: int, spoil: Callable[[Aligned], None] = lambda _: None) -> Found:
    """All matrices of the blocks and their inputs rounded, on the certify part."""

    def make() -> Found:
        kept = _rewritten(bench, _bits(how, bits[1]), seed)
        aligned = Aligned(kept.original, kept.parts, kept.moves)
        spoil(aligned)
        model = aligned.load(torch.float32)
        level = WeightAndInputs(Grid(bits[0], None, symmetric=True), bits[1])
        held = 0
        for segment in aligned.anatomy.segments():
            for site in segment.sites if segment.name else ():
                method: Transform = Inputs(RTN())
                if site.roles["part"] == "scan_out" and how != PLAIN:
                    method = Hadamard(method)
                layer = model.get_submodule(site.name)
                weight: Tensor = layer.weight.data  # type: ignore[assignment, union-attr]
                form = method(site, {"weight": weight}, {}, level).hold[site.tensors["weight"]]
                weight.copy_(form.dense())
                fed(layer, form)
                held += form.nbytes
        return measured(bench, model, held)

    found: Found = bench.once(("rounded", how, bits, _drawn(how, seed), spoil), make)
    return found


def _said(label: str, name: str, found: list[Found]) -> Duel:
    return [], {
        f"{label}: KL, {name}": spread([one.kl for one in found], "nats/token"),
        f"{label}: rise of perplexity, {name}": spread([one.gap for one in found], "share"),
    }


# ---- checks


def _forget_gates(aligned: Aligned) -> None:
    """A stand-in's: gates are scaled, their activation is not."""
    for name, value in aligned.extra.items():
        aligned.extra[name] = torch.ones_like(value)


@gathered
def _exact(lab: Lab, spoil: Callable[[Aligned], None], seeds: tuple[int, ...]) -> Iterator[Duel]:
    found = []
    for seed in lab.draws(seeds):
        for bench in (_trained(lab), _loud(lab, seed)):
            for how in (OURS, TURNED, PLAIN):
                aligned = _rewritten(bench, how, seed).exact()
                spoil(aligned)
                found.append(difference(bench.source, aligned, bench.certify.inputs[:2]))
    wrong = [] if max(found) <= 1e-4 else [f"logits differ by {max(found):.1e} of their norm"]
    yield wrong, {"difference of logits": spread(found, "of their norm")}


def _moments(bench: Bench, how: Align, seed: int) -> dict[str, Tensor]:
    """Second moments of what the layers' projections read on the certify part: of the first projections together, of each step's alone."""
    walk = Walk(_rewritten(bench, how, seed).exact(), bench.certify.inputs, batch=bench.batch)
    walk.begin()
    found: dict[str, Tensor] = {}
    for segment in walk.layers:
        module = walk.take(segment)
        sites = {site.roles["part"]: site for site in segment.sites}
        for part in ("scan_in", "step"):
            gram = walk.observe(module, segment, [sites[part]], (Gram(),))[sites[part].name][Gram()].diagonal()
            name = "stream" if part == "scan_in" else segment.name
            found[name] = found.get(name, torch.zeros_like(gram)) + gram
        walk.advance(module, segment)
        release(module)
    return found


@gathered
def _even(lab: Lab, how: Align, seeds: tuple[int, ...]) -> Iterator[Duel]:
    bench = _trained(lab)
    ratios: dict[str, list[float]] = {"ours": [], "Hadamard": []}
    wrong = []
    for seed in lab.draws(seeds):
        pair = {}
        for name, method in (("ours", how), ("Hadamard", TURNED)):
            key = ("moments", method, _drawn(method, seed))
            moments: dict[str, Tensor] = bench.once(key, partial(_moments, bench, method, seed))
            pair[name] = {at: float(values.max() / values.min()) for at, values in moments.items()}
            ratios[name] += pair[name].values()
        if any(ours > 1.5 for ours in pair["ours"].values()):
            wrong.append(f"variances of channels differ by a factor of {max(pair['ours'].values()):.2f}, seed {seed}")
        if any(2 * (ours - 1) > pair["Hadamard"][at] - 1 for at, ours in pair["ours"].items()):
            wrong.append(f"no nearer to 1 than half of what Hadamard leaves, seed {seed}")
    yield wrong, {f"largest over least channel variance, {name}": spread(values, "") for name, values in ratios.items()}


@gathered
def ordered(lab: Lab, chain: Mapping[str, Align], seeds: tuple[int, ...]) -> Iterator[Duel]:
    """Each method's KL is below the next one's, in every seed, with loud channels."""
    for label, bits in (("W8A8", W8A8), ("W4A8", W4A8), ("W8A6", W8A6)):
        found = {name: [_rounded(_loud(lab, seed), how, bits, seed) for seed in lab.draws(seeds)] for name, how in chain.items()}
        for name, each in found.items():
            yield _said(label, name, each)
        for (name, ours), (other, theirs) in zip(list(found.items())[:-1], list(found.items())[1:], strict=True):
            if any(a.kl >= b.kl for a, b in zip(ours, theirs, strict=True)):
                yield [f"{label}: KL of {name} is not below that of {other} in every seed"], {}


@gathered
def _half(lab: Lab, on: Callable[[Lab, int], Bench], how: Align, seeds: tuple[int, ...]) -> Iterator[Duel]:
    ours, turned = ([_rounded(on(lab, seed), method, W8A8, seed) for seed in lab.draws(seeds)] for method in (how, TURNED))
    yield _said("W8A8", "ours", ours)
    yield _said("W8A8", "Hadamard", turned)
    ratios = [a.kl / b.kl for a, b in zip(ours, turned, strict=True)]
    yield ([] if max(ratios) < 0.5 else [f"up to {max(ratios):.2f} of Hadamard's KL"]), {"KL, as a share of Hadamard's": spread(ratios, "")}


@gathered
def _percent(lab: Lab, spoil: Callable[[Aligned], None], seeds: tuple[int, ...]) -> Iterator[Duel]:
    for name, on in (("as trained", _trained), ("with loud channels", _loud)):
        found = [_rounded(on(lab, seed), OURS, W8A8, seed, spoil) for seed in lab.draws(seeds)]
        yield _said("W8A8", name, found)
        if max(one.gap for one in found) >= 0.01:
            yield [f"{name}: perplexity rises by {max(one.gap for one in found):.1%}"], {}


def _as_it_is(aligned: Aligned) -> None:
    """Nothing is spoilt."""


PAPER = Paper("Xu et al.", 2025, "arXiv:2501.13484", "section 5")
SCALE = (
    "mamba (1.4 M parameters), matrices of the blocks, one scale a row, inputs by one scale a token, 16 x 512 calibration tokens, 3 seeds"
)
LOUD = f"{SCALE}; {CHANNELS} channels of each norm and convolution {LOUDER:g} times as loud, drawn by the seed"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The transforms leave the outputs in full precision as they are, to 1e-4.",
        where=replace(PAPER, section="section 4"),
        scale=f"{SCALE}, and with loud channels",
        check=partial(_exact, spoil=_as_it_is, seeds=SEEDS),
        broken=partial(_exact, spoil=_forget_gates, seeds=ONE),
    ),
    Claim(
        says="Karhunen-Loeve and Hadamard together leave channel variances within a factor of 1.5, far nearer to 1 than Hadamard alone.",
        where=replace(PAPER, section="section 4.1"),
        scale=f"{SCALE}; held-out text, the stream over all layers and the ranks of each layer's steps",
        check=partial(_even, how=OURS, seeds=SEEDS),
        broken=partial(_even, how=Unspread(), seeds=ONE),
    ),
    Claim(
        says="At W8A8, W4A8 and W8A6 the KL is below that of a plain Hadamard rotation, and that below the one of rounding to nearest.",
        where=replace(PAPER, section="section 5, tables 2 to 4"),
        scale=LOUD,
        check=partial(ordered, chain={"MambaQuant": OURS, "Hadamard": TURNED, "RTN": PLAIN}, seeds=SEEDS),
        broken=partial(ordered, chain={"MambaQuant": Unspread(), "Hadamard": TURNED, "RTN": PLAIN}, seeds=ONE),
    ),
    Claim(
        says="At W8A8 the KL is below half of that of a plain Hadamard rotation, where a few channels are loud.",
        where=replace(PAPER, section="section 5, tables 2 to 4"),
        scale=LOUD,
        check=partial(_half, on=_loud, how=OURS, seeds=SEEDS),
        broken=partial(_half, on=_loud, how=Unspread(), seeds=ONE),
    ),
    Claim(
        says="At W8A8 the KL is below half of that of a plain Hadamard rotation, on the model as it was trained.",
        where=replace(PAPER, section="section 5, tables 2 to 4"),
        scale=SCALE,
        check=partial(_half, on=_trained, how=OURS, seeds=SEEDS),
        broken=partial(_half, on=_trained, how=Unspread(), seeds=ONE),
    ),
    Claim(
        says="W8A8 costs less than 1 % of perplexity.",
        where=replace(PAPER, section="abstract"),
        scale=f"{SCALE}, and with loud channels",
        check=partial(_percent, spoil=_as_it_is, seeds=SEEDS),
        broken=partial(_percent, spoil=_forget_gates, seeds=ONE),
    ),
)
