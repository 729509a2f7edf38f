"""The Python functions behind the commands: each opens what is named, does one job and returns plain values."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic import artifact, catalogue, job, measurement, picking, vectors, verifying
from laconic.budget import parse_budget
from laconic.core.decoder import Decoder, Draw, Stack
from laconic.core.errors import BrokenPromise, UserError, nearest
from laconic.core.menu import Search
from laconic.core.packed import below
from laconic.core.score import Score
from laconic.core.state import Pattern, State
from laconic.data import Split, Texts, open_data
from laconic.decoding import Layers, body_of
from laconic.kernels.gpu import load as load_kernels
from laconic.kernels.memory import give_back
from laconic.models import Source, is_artifact, open_model
from laconic.pipeline import Log, Progress, batch_of, quiet
from laconic.recipe import Recipe, build, load_recipe
from laconic.stepping import Steps, steps_of
from laconic.zoo import corpus, nano

if TYPE_CHECKING:
    from laconic.runtime import StateCache

Model = str | Path | nn.Module | None

# a certificate counts as reproduced where every quality figure is as near as this, relatively: other processors sum in another order
SAME = 1e-3
# of a result of up to so many parameters, what has no product of its own runs from dense copies: at most 2 GB in fp32, and many times
# faster than unpacking at each token
DENSE = 500_000_000
# how the past is held, and how tokens are drawn, where nothing else is said
FULL, ONE_BY_ONE = "cache.store.full", "decode.sample.ancestral"
# samples of each part where all of a network learns with its routers, which takes more of them than statistics do
ROUTED = (16384, 1024, 4096)
# held-out prompts that a decoder is measured on
DRAFTED = 16


@dataclass(frozen=True)
class Budget:
    """size: "25%" of the model's bf16 bytes, "120MB" (10^6) or "120MiB" (2^20); bits: stored bits over all parameters. Both hold."""

    size: str | None = None
    bits: float | None = None

    def words(self) -> list[str]:
        """As the command line writes it."""
        return [f"{name}={value}" for name, value in (("size", self.size), ("bits", self.bits)) if value is not None]


class Result(NamedTuple):
    """A finished output folder: open it with laconic.load(result.path)."""

    path: Path
    certificate: dict[str, Any]
    measurements: dict[str, Any]


def say(line: str) -> None:
    """A Log that prints."""
    print(line)


# ---- what is named, opened


def default_model() -> Path:
    """The folder of the embedded model."""
    path = nano.path()
    if not (path / "config.json").is_file():
        raise UserError("this installation holds no embedded model; name a Hugging Face folder, a hub id or package.module:function")
    return path


def _source(model: Model) -> Source:
    return open_model(model, default=default_model() if model is None or model == "" else None)


def _default_texts() -> Texts:
    try:
        texts = {name: [text for _, text in corpus.named(name)] for name in corpus.LISTS}
        return Texts(**texts, record={name: corpus.record(name) for name in corpus.LISTS})
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def _affordable(source: Source) -> tuple[int, int, int] | None:
    """Fewer rows of data for large models, so that one pass over the certify part stays within minutes on a CPU: at most 5e12 operations,
    rows of 512 tokens counted. None where the usual rows fit."""
    rows = max(2, int(5e12 / (2 * max(source.parameters, 1) * 512)))
    return None if source.task != "text" or rows >= 64 else (min(128, 4 * rows), min(32, rows), rows)


def _split(
    source: Source,
    data: str | Path | None,
    certify: str | Path | None,
    *,
    seed: int,
    length: int | None = None,
    routes: bool = False,
    log: Log,
) -> Split:
    if data is None and source.task == "text":
        log("no data was given: Python's standard library is used; your own text (--data FILE) fits your use better")
    limits = _affordable(source)
    if limits is not None:
        log(f"the model is large: {limits[0]} rows calibrate, {limits[1]} search, {limits[2]} certify")
    if routes and source.task != "text":
        limits = ROUTED
    split = open_data(
        None if data is None else str(data),
        source,
        seed=seed,
        certify=None if certify is None else str(certify),
        length=length,
        limits=limits,
        default=_default_texts,
    )
    if source.traced:
        source.trace(split.calibrate.inputs[:1], split.given)
    return split


def _words(budget: Budget | Sequence[str] | str | None) -> list[str]:
    if budget is None:
        return []
    if isinstance(budget, Budget):
        return budget.words()
    return [budget] if isinstance(budget, str) else list(budget)


def _plan(plan: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A plan's content, checked for what every use of it needs."""
    name = "the plan" if isinstance(plan, Mapping) else f"plan file {plan}"
    found: Any = plan
    if not isinstance(plan, Mapping):
        try:
            found = json.loads(Path(plan).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{name} does not exist; make it with `laconic plan MODEL --budget size=25% -o {plan}`") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read as JSON ({error}); make it again with `laconic plan`") from None
    needed = ("model", "budget", "recipe", "seed", "data", "choices", "kept", "menu", "predicted")
    missing = [key for key in needed if not isinstance(found, Mapping) or key not in found]
    if missing:
        raise UserError(f"{name} is no plan of laconic (it lacks {', '.join(missing)}); make it again with `laconic plan`")
    return dict(found)


def _recipe(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def _spec(value: Any) -> str | None:
    """A spec as certificates write it: the empty word stands for the default."""
    return str(value) if value else None


# ---- plan, compress


class _Job(NamedTuple):
    source: Source
    split: Split
    recipe: Recipe
    words: list[str]
    seed: int


def _open_job(
    model: Model,
    data: str | Path | None,
    data_certify: str | Path | None,
    words: list[str],
    plan: Mapping[str, Any] | None,
    recipe: str | Path | Recipe | None,
    seed: int | None,
    log: Log,
) -> _Job:
    """Everything a job needs; what is not given comes from the plan, where there is one."""
    length = None
    if plan is not None:
        if words:
            own = " ".join(plan["budget"]["words"])
            raise UserError(f"a plan holds its own budget ({own}); leave the budget out, or make another plan")
        if recipe is not None:
            raise UserError("a plan holds its own recipe; leave the recipe out, or make another plan")
        words = list(plan["budget"]["words"])
        recipe = Recipe.model_validate(plan["recipe"])
        if model is None:
            model = _spec(plan["model"].get("spec"))
        if data is None:
            data = _spec(plan["data"].get("spec"))
            data_certify = data_certify or _spec((plan["data"].get("certify") or {}).get("spec"))
            length = plan["data"].get("length")
        seed = int(plan["seed"]) if seed is None else seed
    chosen = _recipe("auto" if recipe is None else recipe)
    if chosen.vectors is not None:
        raise UserError(f"recipe {chosen.name} is for a file of vectors (.npy, .npz, .safetensors); name one, or take another recipe")
    source = _source(model)
    # a wrong budget is found before any data is read
    job.parse_budget(words, source, needed=chosen.chooses)
    seed = 0 if seed is None else seed
    split = _split(source, data, data_certify, seed=seed, length=length, routes=chosen.route is not None, log=log)
    return _Job(source, split, chosen, words, seed)


def plan(
    model: Model = None,
    data: str | Path | None = None,
    *,
    budget: Budget | Sequence[str] | str | None = None,
    recipe: str | Path | Recipe | None = None,
    data_certify: str | Path | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """What would be done where, at which level, at what price: plan.json's content, written to `out` where that is given."""
    _ready(device)
    opened = _open_job(model, data, data_certify, _words(budget), None, recipe, seed, log)
    with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
        # without a file to write there is nothing to resume, so the journal may go
        target = Path(out) if out is not None else Path(scratch) / "plan.json"
        if target.is_dir():
            raise UserError(f"{target} is a folder; name a file for the plan, such as -o plan.json")
        source, split, chosen, words, seed = opened
        made = job.plan(source, split, chosen, words, target, seed=seed, overwrite=overwrite, device=device, progress=progress, log=log)
        if out is not None:
            _write(target, made)
    return made


def _ready(device: str) -> None:
    """Makes ready for a job; UserError where torch cannot compute on a device of this name."""
    give_back()
    reason = "it is neither cpu nor cuda"
    if device.partition(":")[0] in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
            load_kernels()
            return
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
    raise UserError(f"device {device!r} cannot be used here ({reason}); use cpu, or cuda where torch finds a GPU")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON by way of a neighbour and a rename, so that no half of it is ever seen."""
    near = path.with_name(f".{path.name}.new")
    try:
        near.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        near.replace(path)
    except OSError as error:
        near.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place with -o") from error


def command(
    model: Model,
    out: str | Path,
    words: Sequence[str],
    recipe: str | Path | None,
    data: str | Path | None,
    certify: str | Path | None,
    seed: int,
    plan: str | Path | None,
    device: str = "cpu",
) -> str:
    """The command line that replays a job."""
    parts = ["laconic", "compress", *([str(model)] if isinstance(model, (str, Path)) and str(model) else [])]
    if plan is not None:
        parts += ["--plan", str(plan)]
    else:
        parts += [part for word in words for part in ("--budget", word)] + ["--recipe", str(recipe)]
    parts += ["--data", str(data)] if data is not None else []
    parts += ["--data-certify", str(certify)] if certify is not None else []
    parts += ["--device", device] if device != "cpu" else []
    return shlex.join([*parts, "--seed", str(seed), "-o", str(out)])


def compress(
    model: Model = None,
    data: str | Path | None = None,
    *,
    budget: Budget | Sequence[str] | str | None = None,
    plan: Mapping[str, Any] | str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    out: str | Path = "out",
    data_certify: str | Path | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = quiet,
    log: Log = say,
) -> Result:
    """The main job: the best smaller model within the budget, written to `out` with its certificate.

    Killed at any moment, the same call goes on where it stood. Raises UserError (nothing half-written) or BrokenPromise."""
    _ready(device)
    given = None if plan is None else _plan(plan)
    target = Path(out)
    if vectors.is_file(model):
        if device != "cpu":
            raise UserError(f"{model} is a file of vectors, which the processor shortens; leave the device out")
        return _shorten(model, data, _words(budget), given, recipe, target, seed, overwrite, progress, log)
    # the cheap refusal comes before the data is read
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise UserError(f"the output {target} exists; choose another with -o, or replace it with --overwrite")
    opened = _open_job(model, data, data_certify, _words(budget), given, recipe, seed, log)
    named = (recipe.name if isinstance(recipe, Recipe) else recipe) or "auto"
    at = None if given is None else plan if isinstance(plan, (str, Path)) else target / "plan.json"
    made = job.compress(
        opened.source,
        opened.split,
        budget=opened.words,
        recipe=opened.recipe,
        out=target,
        seed=opened.seed,
        plan=given,
        overwrite=overwrite,
        device=device,
        progress=progress,
        log=log,
        command=command(model, out, opened.words, named, data, data_certify, opened.seed, at, device),
    )
    return Result(target, {key: value for key, value in made.items() if key != "measurements"}, made["measurements"])


def _shorten(
    path: Any, data: str | Path | None, words: list[str], plan: Any, recipe: str | Path | Recipe | None, out: Path, seed: int | None,
    overwrite: bool, progress: Progress, log: Log,
) -> Result:  # fmt: skip
    """The job for a file of vectors."""
    chosen = _recipe("mrl" if recipe is None else recipe)
    if chosen.vectors is None:
        raise UserError(f"{path} is a file of vectors, and recipe {chosen.name} is for models; take --recipe mrl")
    if data is not None or plan is not None:
        raise UserError(f"{path} is a file of vectors: it is split by itself and has no plan; leave --data and --plan out")
    if not words:
        raise UserError("no budget given; add --budget recall=0.95 (or size=10%, or dims=64)")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise UserError(f"the output {out} exists; choose another with -o, or replace it with --overwrite")
    named = chosen.name if isinstance(recipe, Recipe) or recipe is None else recipe
    replay = command(path, out, words, named, None, None, seed or 0, None)
    made = vectors.compress(
        path, budget=words, recipe=chosen, out=out, seed=seed or 0, overwrite=overwrite, progress=progress, log=log, command=replay
    )
    return Result(out, {key: value for key, value in made.items() if key != "measurements"}, made["measurements"])


def load(
    path: Model = None,
    *,
    dtype: torch.dtype = torch.float32,
    thaw: bool = False,
    budget: Budget | Sequence[str] | str | None = None,
    inputs: int | None = None,
    log: Log = say,
) -> nn.Module:
    """A result or an original as a torch.nn.Module in eval mode. thaw: dense copies in `dtype`, as large as the original.
    inputs: 8 rounds what matrices of grouped codes are multiplied with to 8 bits as it comes: faster on many tokens, and other numbers.
    budget: an elastic result (recipe bitstack, matformer) cut to it; only the bytes of what fits are read. Of a
    result of vectors, `recall=0.9`, `dims=64` or `size=10%`; it computes short vectors and searches them."""
    if isinstance(path, (str, Path)) and vectors.is_result(path):
        _as_they_are(path, inputs)
        return vectors.load(path, _words(budget))
    limit = _limit(path, budget)
    if isinstance(path, (str, Path)) and path and is_artifact(path):
        return artifact.load(path, dtype=dtype, thaw=thaw, limit=limit, inputs=inputs, log=log)
    _as_they_are(path, inputs)
    return _source(path).load(dtype)


def _as_they_are(path: Model, inputs: int | None) -> None:
    """UserError for rounded inputs of what holds no matrix in codes."""
    if inputs is not None:
        name = path or "the embedded model"
        raise UserError(f"{name} holds no matrix in codes, so its products take inputs as they are: leave inputs out, or compress it first")


def _limit(path: Model, budget: Budget | Sequence[str] | str | None) -> int | None:
    """The bytes that an elastic result is cut to; None without a budget. UserError for what has one size."""
    if not (words := _words(budget)):
        return None
    if not (isinstance(path, (str, Path)) and path and is_artifact(path)):
        raise UserError(f"{path or 'the embedded model'} is an original, which has one size: leave the budget out, or compress it first")
    if (index := artifact.elastic(path)) is None:
        raise UserError(artifact.ONE_SIZE.format(path))
    return parse_budget(words, index).bytes


# ---- measure, bench


def _certificate(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / "certificate.json"
    if not file.is_file():
        raise UserError(f"{folder} has no certificate.json; name a folder that `laconic compress` wrote")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found["model"], dict) or not isinstance(found["quality"], dict):
            raise TypeError("model and quality must be objects")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); run the compression again with --overwrite") from None
    return dict(found)


def _original(path: str | Path, against: Model) -> Model:
    """What a result is compared with: what is given, else what its certificate names."""
    return against if against is not None else _spec(measurement.original_of(path))


def _recorded_split(source: Source, record: Mapping[str, Any], log: Log) -> Split:
    """The data of a certificate, opened again."""
    certify = _spec((record.get("certify") or {}).get("spec"))
    return _split(source, _spec(record.get("spec")), certify, seed=int(record.get("seed", 0)), length=record.get("length"), log=log)


def select(
    pool: str | Path,
    like: str | Path,
    *,
    budget: Sequence[str] | str,
    out: str | Path = "selected.jsonl",
    score: str = "select.score.dsir",
    search: str = "search.sample.gumbel",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """Writes the documents of a pool of text that read most like a sample of it: data to calibrate on. budget: examples=1000, size=2MB or
    size=10% of the pool; -> counts, bytes and KL of the features to the sample before and after."""
    from laconic.selection import select as chosen

    scores, buys = build(score), build(search)
    if not isinstance(scores, Score):
        raise UserError(f"{score} is no score; try select.score.dsir")
    if not isinstance(buys, Search):
        raise UserError(f"{search} is no search; try search.sample.gumbel")
    return chosen(
        str(pool), str(like), budget=_words(budget), score=scores, search=buys, seed=seed, out=Path(out), overwrite=overwrite,
        progress=progress, log=log,
    )  # fmt: skip


def advise(
    model: Model = None,
    data: str | Path | None = None,
    *,
    also: Sequence[str | Path] = (),
    budget: Budget | Sequence[str] | str | None = "bits=4.25",
    recipe: str | Path | Recipe = "gptq",
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """What to calibrate on: one plan carried out with fewer rows, shorter rows, `also` other data and none, each measured on held-out text
    of `data`; -> the figures of each (`tried`) and the `advice` in sentences."""
    from laconic import advice

    _ready(device)
    opened = _open_job(model, data, None, _words(budget), None, recipe, seed, log)
    source, split, chosen, words, _ = opened
    length = split.calibrate.inputs.shape[1] if source.task == "text" else None
    limits = _affordable(source)
    others = {str(spec): open_data(str(spec), source, seed=seed, length=length, limits=limits).calibrate.inputs for spec in also}
    found = advice.advise(source, split, others, recipe=chosen, budget=words, seed=seed, device=device, progress=progress, log=log)
    return {
        "recipe": chosen.name,
        "budget": words,
        "unit": "nats a prediction",
        "tried": [one._asdict() for one in found],
        "advice": advice.words(found),
    }


def measure(
    path: str | Path,
    against: Model = None,
    data: str | Path | None = None,
    *,
    data_certify: str | Path | None = None,
    budget: Budget | Sequence[str] | str | None = None,
    inputs: int | None = None,
    seed: int = 0,
    speed: bool = True,
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """Quality, bytes, speed and memory of a result (or any model) against its original, on the certify part of the data; flat keys, with
    unit, count and spread under `details`. against: default is the original that the certificate names; data: that of the certificate;
    budget: an elastic result cut to it; inputs: 8 rounds inputs of products to 8 bits, and all of this is of the model that does."""
    if vectors.is_result(path):
        _as_they_are(path, inputs)
        return vectors.measure(path, against, _words(budget))  # type: ignore[arg-type]
    limit = _limit(path, budget)
    named = _original(path, against)
    source = _source(named)
    if data is None and (Path(path) / "certificate.json").is_file():
        split = _recorded_split(source, _certificate(path).get("data", {}), log)
    else:
        split = _split(source, data, data_certify, seed=seed, log=log)
    if not is_artifact(path):
        _as_they_are(path, inputs)
    if speed:
        _refuse_red(path)
    found = measurement.measure(
        path,
        "" if named is None else named,  # type: ignore[arg-type]
        split.certify,
        metric=split.metric,
        given=split.given,
        with_speed=speed,
        default=default_model() if named is None else None,
        seed=seed,
        limit=limit,
        inputs=inputs,
        log=log,
        progress=lambda done, total: progress("measuring", done, total, "rows"),
    )
    if speed:
        _add_drafting(path, split, found, progress, inputs)
    return found


def _add_drafting(path: str | Path, split: Split, found: dict[str, Any], progress: Progress, inputs: int | None) -> None:
    """How a result's own decoder does on the certify part, as `generate` runs it; nothing where it has none."""
    if not (isinstance(path, (str, Path)) and is_artifact(path) and artifact.decoder_of(path)):
        return
    progress("timing", 0, 1, "the decoder and decoding one by one take turns")
    talk = open_talk(path, inputs=inputs, log=lambda line: None)
    assert talk.decoder is not None
    prompts = split.certify.inputs[:DRAFTED, :64]
    new = min(64, talk.context - prompts.shape[1]) if talk.context else 64
    if new < 2:
        return
    more = measurement.drafting(talk.decoder, talk.stack, talk.plainly, prompts, new=new)
    found["details"] |= more.pop("details")
    found |= more
    progress("timing", 1, 1, "the decoder and decoding one by one take turns")


def _refuse_red(path: str | Path) -> None:
    """No speed beside a red equality check."""
    if (Path(path) / "certificate.json").is_file() and not _certificate(path).get("reload", {}).get("ok", False):
        raise BrokenPromise(f"{path} computes something else than was searched (reload check), so no speed is printed; compress it again")


def bench(
    path: str | Path,
    against: Model = None,
    *,
    prompt: int = 128,
    new: int = 32,
    repeats: int = 7,
    record: bool = False,
    inputs: int | None = None,
    explain: bool = False,
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """Prefill and decode speed of a result and of its original, taking turns; memory; hardware. record: into its measurements.json too.
    inputs: 8 rounds inputs of the result's products to 8 bits. explain: `steps` says where the result's time goes, `details.steps` what
    else runs it, `picks` which way products with codes go (`kernels.picks`), which the first bench on a machine measures and keeps."""
    if record and inputs is not None:
        raise UserError("measurements.json keeps the speed of the result as it loads by itself: leave out --record or --inputs")
    if repeats < 1 or prompt < 1 or new < 1:
        raise UserError(f"prompt {prompt}, new {new} and repeats {repeats} must each be at least 1; give larger numbers")
    named = _original(path, against)
    source = _source(named)
    if source.task != "text":
        raise UserError(f"{source.spec} is no language model; speed is measured in tokens, so there is none to measure yet")
    _refuse_red(path)
    dtype = torch.bfloat16
    ways = picking.known(progress, log)
    with measurement.watch() as peak:
        progress("timing", 0, 1, "the original and the result take turns")
        original = source.load(dtype).eval()
        compressed = load(path, dtype=dtype, inputs=inputs, log=log).eval()
        found = measurement.speed(original, compressed, prompt=prompt, new=new, repeats=repeats)
        progress("timing", 1, 1, "")
    if explain:
        found["picks"] = [{"product": way.product.name, **way.words()} for way in ways]
        steps = steps_of(compressed)
        if isinstance(steps, Steps):
            with torch.inference_mode():
                spent = steps.spent(measurement.any_tokens(compressed, prompt), new)
            found["steps"] = {phase: [row._asdict() for row in rows] for phase, rows in spent.items()}
        else:
            found["details"]["steps"] = {"what": f"the model's own forward pass in transformers runs it: {steps}"}
    del original, compressed
    found["peak_memory_bytes"] = peak.bytes
    found["details"]["peak_memory_bytes"] = {"unit": "bytes", "n": 1, "what": "process tree of this bench, which holds both models"}
    found["hardware"] = measurement.hardware()
    if (Path(path) / "certificate.json").is_file() and artifact.decoder_of(path):
        _add_drafting(path, _recorded_split(source, _certificate(path).get("data", {}), log), found, progress, inputs)
    if record and is_artifact(path):
        _record_speed(Path(path), found)
    return found


def _record_speed(folder: Path, found: Mapping[str, Any]) -> None:
    """Speeds into measurements.json; the compression's own memory and seconds stay."""
    file = folder / "measurements.json"
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    speeds = {key: value for key, value in found.items() if key.endswith("_tokens_per_s") or key == "original"}
    details = {key: value for key, value in found["details"].items() if "_tokens_per_s" in key}
    _write(file, {**kept, **speeds, "hardware": found["hardware"], "details": {**kept.get("details", {}), **details}})


# ---- generate


class Talk(NamedTuple):
    """A model with its tokenizer, ready to generate. context: most positions, 0 where there is no bound. ends: ids that end a text.
    decoder, parts: what draws several tokens a pass, None where it is one by one; cache: how the past is held, None: as it comes.
    stepped: whether a tape of native steps gives the model's logits (`stepping.Steps`)."""

    model: nn.Module
    tokenizer: Any
    context: int
    ends: frozenset[int]
    decoder: Decoder | None = None
    parts: Mapping[str, nn.Module] = {}
    cache: str | None = None
    stepped: bool = False

    def state(self) -> State:
        """An empty State for one text."""
        return _state(self.cache or FULL)

    def stack(self) -> Stack:
        """The model as a Decoder runs it, with nothing behind it."""
        if self.stepped:
            return Steps(self.model, self.state(), self.parts, holds=self.cache is not None)
        return Layers(self.model, self.state(), self.parts)

    def plainly(self, prompt: Tensor, new: int) -> tuple[tuple[int, ...], float]:
        """prompt (1, t) -> `new` greedy tokens one by one, and the seconds after the first."""
        if not self.stepped:
            return measurement.plainly(self.model, prompt, new)
        found = measurement.decoded(_decoder(ONE_BY_ONE), self.stack(), prompt, new=new, draw=Draw())
        return found.tokens, found.seconds


def open_talk(
    model: Model = None,
    *,
    dtype: torch.dtype = torch.float32,
    budget: Budget | Sequence[str] | str | None = None,
    decoder: str | None = None,
    cache: str | None = None,
    inputs: int | None = None,
    attention: str | None = None,
    log: Log = say,
) -> Talk:
    """Loads a result (an elastic one cut to a budget) or an original with its tokenizer. decoder: in written form; None: the result's own,
    where it has one. inputs: as `load`; attention: as `attend`. UserError for a model that writes no text, and for a decoder whose parts
    the model does not have."""
    if cache is not None:
        _state(cache)
    chosen = None if decoder is None else _decoder(decoder)
    is_result = isinstance(model, (str, Path)) and bool(model) and is_artifact(model)
    source: Any = artifact.stream(model) if is_result else _source(model)  # type: ignore[arg-type]
    if source.task != "text":
        raise UserError(f"{source.spec} is no language model; generate needs one that writes text")
    tokenizer = source.tokenizer()
    drawn, parts = _parts(model, source, chosen, dtype) if is_result or chosen is not None else (None, {})
    loaded = load(model, dtype=dtype, budget=budget, inputs=inputs, log=log)
    small = inputs is None and source.parameters <= DENSE
    if small:
        # what has no product of its own would be made dense for every token
        artifact.thawed(loaded, dtype, lambda layer: layer.weight.read() is None)
    if attention is not None:
        attend(loaded, attention)
    stepped = isinstance(steps_of(loaded), Steps)
    if small and not stepped:
        artifact.thawed(loaded, dtype)
    ends: set[int] = set()
    holder: Any
    for holder in (getattr(loaded, "generation_config", None), getattr(loaded, "config", None), tokenizer):
        found = getattr(holder, "eos_token_id", None)
        ends |= set(found) if isinstance(found, (list, tuple)) else {found} if isinstance(found, int) else set()
    return Talk(loaded, tokenizer, int(source.context or 0), frozenset(ends), drawn, parts, cache, stepped)


def _decoder(text: str) -> Decoder:
    """A Decoder from its written form."""
    found = build(text)
    if not isinstance(found, Decoder):
        names = sorted(entry.name for entry in catalogue.select(role="decoder"))
        raise UserError(f"{text} is no decoder{nearest(text, names)}")
    return found


def _parts(model: Model, source: Any, chosen: Decoder | None, dtype: torch.dtype) -> tuple[Decoder | None, dict[str, nn.Module]]:
    """The decoder that runs a model, the chosen one or the result's own, and its parts, filled."""
    own = artifact.decoder_of(model) if isinstance(model, (str, Path)) and is_artifact(model) else None
    decoder = chosen if chosen is not None else _decoder(own[0]) if own is not None else None
    if decoder is None:
        return None, {}
    parts = dict(decoder.place(body_of(source.config), None).place) if source.config is not None else {}
    stored = own[1] if own is not None else {}
    if parts and (own is None or _decoder(own[0]).tap != decoder.tap):
        name = type(decoder).__name__.lower()
        raise UserError(
            f"{model or 'the embedded model'} holds no parts for {name}(tap={decoder.tap}); make them with a recipe that names it under "
            "`decode`, such as `laconic compress MODEL --recipe kangaroo -o out`"
        )
    for path, part in parts.items():
        values = {name: value.to(dtype) for name, value in below(stored, path).items()}
        try:
            part.load_state_dict(values, assign=True)
        except RuntimeError as error:
            raise UserError(f"{artifact.PLACED} of {model} does not hold {path} whole ({error}); write the folder again") from None
        part.eval().requires_grad_(False)
    return decoder, parts


def prompt_ids(talk: Talk, prompt: str, *, raw: bool = False) -> Tensor:
    """Token ids (1, t) of a prompt: in the tokenizer's chat template where it has one, as it stands with `raw`."""
    if getattr(talk.tokenizer, "chat_template", None) and not raw:
        text = talk.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = talk.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = list(talk.tokenizer(prompt)["input_ids"])
        # an end after the prompt would close the text before it has begun
        if len(ids) > 1 and ids[-1] in talk.ends:
            ids = ids[:-1]
    if not ids:
        start = talk.tokenizer.bos_token_id if talk.tokenizer.bos_token_id is not None else talk.tokenizer.eos_token_id
        if start is None:
            raise UserError("the prompt is empty and the tokenizer has no token that begins a text; give a prompt")
        ids = [start]
    if talk.context and len(ids) >= talk.context:
        raise UserError(f"the prompt has {len(ids)} tokens and the model's context is {talk.context}; shorten the prompt")
    return torch.tensor([ids])


def tokens(talk: Talk, ids: Tensor, *, limit: int, temperature: float, generator: torch.Generator) -> Iterator[int]:
    """New token ids one by one, with a KV cache or states: the likeliest at temperature 0, else drawn; until an end, limit or context. By
    the model's decoder, where it has one, which draws otherwise from the same distribution."""
    room = min(limit, talk.context - ids.shape[1]) if talk.context else limit
    if talk.decoder is not None or talk.stepped:
        yield from _drafted(talk, ids, room, Draw(temperature, generator))
        return
    cache: dict[str, Any] = {}
    if talk.cache is not None:
        from laconic.runtime import StateCache

        cache = {"past_key_values": StateCache(talk.model, talk.state())}
    step = ids
    for _ in range(room):
        with torch.inference_mode():
            found = talk.model(input_ids=step, use_cache=True, **cache)
        cache, logits = measurement.carried(found), found.logits[0, -1].float()
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in talk.ends:
            return
        yield chosen
        step = torch.tensor([[chosen]])


def _drafted(talk: Talk, ids: Tensor, room: int, draw: Draw) -> Iterator[int]:
    """Tokens as a decoder settles them, an end left out."""
    rounds = (talk.decoder or _decoder(ONE_BY_ONE))(talk.stack(), ids, limit=room, draw=draw, ends=talk.ends)
    while True:
        # never across a yield: a generator left half-way would keep the mode for everyone
        with torch.inference_mode():
            found = next(rounds, None)
        if found is None:
            return
        for one in found.tokens[0].tolist():
            if one in talk.ends:
                return
            yield one


def pieces(talk: Talk, ids: Tensor, new: Iterator[int]) -> Iterator[str]:
    """The text of new tokens as it grows; a character that is not whole yet waits for the next token."""
    # a prompt's last token goes along, because some tokenizers drop a space at the very front; later the tokens of the piece before do
    held: list[int] = ids[0, -1:].tolist()
    begin, said = 0, len(held)

    def more() -> str:
        known, text = (talk.tokenizer.decode(held[begin:end], skip_special_tokens=True) for end in (said, len(held)))
        return str(text[len(known) :])

    for one in new:
        held.append(one)
        text = more()
        if text and not text.endswith("\ufffd"):
            yield text
            begin, said = said, len(held)
    if rest := more():
        yield rest


def generate(
    model: Model = None,
    prompt: str = "",
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    budget: Budget | Sequence[str] | str | None = None,
    cache: str | None = None,
    decoder: str | None = None,
    inputs: int | None = None,
    attention: str | None = None,
    log: Log = say,
) -> Iterator[str]:
    """Pieces of text, token by token, of a result (an elastic one cut to a budget) or an original; join them for the whole. cache: how the
    past is held, `kivi:2` or `cache.store.kivi(bits=2)`. decoder: how tokens are drawn, `decode.sample.ancestral` one by one; None: as the
    result was made for. inputs: 8 rounds inputs of a result's products to 8 bits. attention: the blocks that a prompt attends to,
    `xattention(tau=0.9)`."""
    if max_tokens < 1:
        raise UserError(f"--max-tokens {max_tokens} writes nothing; ask for at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature:g} is not usable; give 0 (always the likeliest token) or more")
    talk = open_talk(model, budget=budget, decoder=decoder, cache=cache, inputs=inputs, attention=attention, log=log)
    ids = prompt_ids(talk, prompt, raw=raw)
    generator = torch.Generator().manual_seed(seed)
    return pieces(talk, ids, tokens(talk, ids, limit=max_tokens, temperature=temperature, generator=generator))


# ---- cache


def cache(model: nn.Module, method: str = "cache.store.kivi") -> StateCache:
    """A KV cache for one `generate` of a transformers decoder, held by a method of the family `cache`.

        model = AutoModelForCausalLM.from_pretrained("path/to/model")
        held = laconic.cache(model, "cache.store.kivi(bits=2)")
        model.generate(**tokenizer("def main(", return_tensors="pt"), past_key_values=held, max_new_tokens=64)
        print(held.nbytes, held.state.bits_per_number)

    Knobs stand in brackets, `kivi:2` is short for this; `laconic show cache.store.kivi` says what they mean. Batches with padding on the
    left, beam search, assisted generation and plain forward passes work as with transformers' own caches. Layers with a sliding window keep
    their own cache. Raises UserError for an unknown method or knob, and for a model without a layer that attends to all past tokens."""
    from laconic.runtime import StateCache

    return StateCache(model, _state(method))


def _state(text: str) -> State:
    """A State from its written form: a path with knobs in brackets, or in short its last word, with bits behind a colon."""
    word, colon, bits = text.partition(":")
    if word.isidentifier() and colon:
        if not bits.isdigit():
            raise UserError(f"cache {text!r} is not understood; behind the colon stand bits, such as {word}:2")
        text = f"{word}(bits={bits})"
    found: State = _named(text, State, "state", "cache")
    return found


def _named(text: str, kind: type[Any], role: str, what: str) -> Any:
    """A method of a role from its written form; its last word is enough of its path."""
    names = {entry.name.rpartition(".")[2]: entry.name for entry in catalogue.select(role=role)}
    word, bracket, knobs = text.partition("(")
    if word.isidentifier():
        if word not in names:
            raise UserError(f"unknown {what} {word!r}{nearest(word, names)}")
        text = names[word] + bracket + knobs
    found = build(catalogue.ALIASES.get(text, text))
    if not isinstance(found, kind):
        raise UserError(f"unknown {what} {text!r}{nearest(text, names.values())}")
    return found


# ---- attention


def attend(model: nn.Module, method: str | None = "attention.sparse.xattention") -> nn.Module:
    """The model, whose prompts attend from now on by a method of the family `attention`, to the blocks that it keeps; None: to all of them.

        model = laconic.attend(laconic.load("out"), "xattention(tau=0.9)")
        model.generate(**tokenizer(long_text, return_tensors="pt"), max_new_tokens=64)

    Acts where a layer attends to all past tokens by torch's `sdpa`, in passes of at least two blocks of tokens without padding; whatever
    else is asked is computed as before. Raises UserError for an unknown method or knob, and for a model that is no such decoder."""
    from laconic.runtime import attend_by

    attend_by(model, None if method is None else _named(method, Pattern, "pattern", "attention"))
    return model


# ---- report


def report(
    out: str | Path, *, against: Model = None, extras: bool = True, count: int = 3, progress: Progress = quiet, log: Log = say
) -> Path:
    """Writes `out`/report.html. extras: for a language model whose original is at hand, also the speeds (measured now where they were not
    yet) and `count` generations of both models side by side, from prompts of the certify data."""
    from laconic.page import render

    folder = Path(out)
    if vectors.is_result(folder):
        raise UserError(f"{folder} holds vectors, and there is no page for them yet; `laconic measure {folder}` says what they are worth")
    certificate = _certificate(folder)
    named = _original(folder, against)
    generations: list[dict[str, Any]] = []
    if extras:
        try:
            source = _source(named)
        except UserError as error:
            log(f"the original cannot be opened, so the page has neither speeds nor generations: {error}")
        else:
            if source.task == "text":
                file = folder / "measurements.json"
                if not file.is_file() or "decode_tokens_per_s" not in json.loads(file.read_text(encoding="utf-8")):
                    bench(folder, named, record=True, progress=progress, log=log)
                generations = _side_by_side(folder, named, source, certificate, count, progress, log)
    progress("drawing", 0, 1, "report.html")
    page = render(folder, against=_spec(against) if isinstance(against, (str, Path)) else None, generations=generations)
    progress("drawing", 1, 1, "report.html")
    return page


def _side_by_side(
    folder: Path, named: Model, source: Source, certificate: Mapping[str, Any], count: int, progress: Progress, log: Log
) -> list[dict[str, Any]]:
    try:
        split = _recorded_split(source, certificate.get("data", {}), lambda _: None)
    except UserError as error:
        log(f"the data of the certificate cannot be opened, so the page has no generations: {error}")
        return []
    rows = split.certify.inputs
    chosen = sorted({i * (rows.shape[0] - 1) // max(1, count - 1) for i in range(count)})
    answers: dict[str, list[Any]] = {"prompt": [], "original": [], "compressed": []}
    # one model in memory at a time
    for number, (name, model) in enumerate((("original", named), ("compressed", folder))):
        talk = open_talk(model)
        for at, i in enumerate(chosen):
            progress("writing", number * len(chosen) + at, 2 * len(chosen), "the same prompts to both models")
            ids = rows[i : i + 1, :40]
            new = tokens(talk, ids, limit=48, temperature=0.0, generator=torch.Generator().manual_seed(0))
            answers[name].append([talk.tokenizer.decode([one]) for one in new])
            if name == "original":
                answers["prompt"].append(talk.tokenizer.decode(ids[0], skip_special_tokens=True))
        del talk
    progress("writing", 2 * len(chosen), 2 * len(chosen), "the same prompts to both models")
    return [{key: answers[key][at] for key in answers} for at in range(len(chosen))]


# ---- verify


def verify(
    name: str | Path | None = None,
    *,
    family: str | None = None,
    full: bool = False,
    again: bool = False,
    confirm: bool = False,
    claim: int | None = None,
    lab: str | Path | None = None,
    progress: Progress = quiet,
    log: Log = say,
) -> dict[str, Any]:
    """A folder: its certificate measured again. A method, or all of a family: the claims of their papers.

    full: at full scale; each verdict is recorded as it comes, so that a run which was stopped goes on, and a claim whose verdict stands
    on the present code and models is not run `again`. Beside each verdict the numbers of the quick form are kept: where code that it
    stands on has changed and the quick form still gives them, it stands too; `confirm` does that alone, for what is recorded. claim: one
    of a method's by its number, from 1. lab: folder of real data. The answer's `ok` is false where a certificate was not reproduced, a
    claim fails, or a claim's broken stand-in did not fail."""
    if (name is None) == (family is None):
        raise UserError("verify needs one thing: a method (quantize.round.gptq), a folder (out), or --family quantize")
    if name is not None and Path(name).is_dir():
        return _verify_folder(Path(name), progress, log)
    if name is not None and (os.sep in str(name) or str(name).startswith(".")):
        raise UserError(f"no such folder: {name}; name a folder that `laconic compress` wrote, or a method")
    entries = [catalogue.find(str(name))] if name is not None else list(catalogue.select(family=family))
    found = verifying.verify(entries, _lab_data(lab), full=full, again=again, confirm=confirm, claim=claim, log=log, progress=progress)
    if not found:
        raise UserError(f"{name or f'family {family}'} has no claim to verify; see `laconic show` for what each method promises")
    ok = all(c["result"] != "fails" and c["broken"]["result"] != "holds" for answer in found for c in answer["claims"])
    return {"ok": ok, "methods": found}


def _lab_data(lab: str | Path | None) -> Path | None:
    """The folder of real data: the given one, else that of LACONIC_DATA, else ../shared/data where it is there."""
    lab = lab if lab is not None else os.environ.get("LACONIC_DATA")
    if lab is not None:
        if not Path(lab).is_dir():
            raise UserError(f"no such folder of data: {lab}; leave --lab out, or correct it")
        return Path(lab).resolve()
    beside = Path("..") / "shared" / "data"
    return beside.resolve() if beside.is_dir() else None


def _verify_folder(folder: Path, progress: Progress, log: Log) -> dict[str, Any]:
    """Files by hash, data by hash, logits' quality measured again on the certify data and compared key by key."""
    certificate = _certificate(folder)
    progress("checking", 0, 3, "files")
    artifact.verify_hashes(folder)
    progress("checking", 1, 3, "the original and the data")
    if vectors.is_result(folder):
        found = vectors.measure(folder, None, ())
        progress("checking", 3, 3, "recall of the certificate's queries")
        return _compared(folder, certificate, found, None)
    source = _source(_spec(certificate["model"].get("spec")))
    if source.hashes() != certificate["model"].get("hashes"):
        name = source.spec or "(embedded)"
        raise UserError(f"the original {name} is not the one of the certificate (its hashes differ); give back that model's files")
    split = _recorded_split(source, certificate.get("data", {}), lambda _: None)
    recorded = (certificate["data"].get("parts") or {}).get("certify", {}).get("sha256")
    if recorded != split.certify.sha256:
        python = f" under Python {platform.python_version()}" if not certificate["data"].get("spec") else ""
        raise UserError(f"the certify data{python} is not that of the certificate (its hash differs); give back the data it names")
    progress("checking", 2, 3, "quality on the certify data")
    written = artifact.stream(folder)
    if source.traced:
        written.trace(split.calibrate.inputs[:1], split.given)
    found = job.quality_of(source, written, split.certify, metric=split.metric, batch=batch_of(source), seed=int(certificate["seed"]))
    load = job.multiplied(written, split) if "multiplications" in certificate else None
    progress("checking", 3, 3, "quality on the certify data")
    return _compared(folder, certificate, found, load)


def _compared(folder: Path, certificate: Mapping[str, Any], found: Mapping[str, Any], load: Mapping[str, float] | None) -> dict[str, Any]:
    """What a certificate says beside what was measured now; load: multiplications of a model that is routed."""
    differences = []
    for key, before in certificate["quality"].items():
        now = found.get(key)
        if isinstance(now, (int, float)) and isinstance(before, (int, float)) and not math.isclose(before, now, rel_tol=SAME, abs_tol=1e-9):
            differences.append({"key": key, "recorded": before, "measured": now})
    compared = sorted(set(found) & set(certificate["quality"]))
    if load is not None:
        compared.append("multiplications")
        recorded = certificate["multiplications"]["expected"]
        if not math.isclose(recorded, load["expected"], rel_tol=SAME):
            differences.append({"key": "multiplications", "recorded": recorded, "measured": load["expected"]})
    same = not differences
    return {"ok": same, "folder": str(folder), "reproduced": same, "compared": compared, "differences": differences, "quality": found}
