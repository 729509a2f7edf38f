"""The whole job: plan, apply, judge, write, read back, measure, certify. Everything before the last rename happens in the work folder."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from laconic import __version__
from laconic.aligning import Aligned, align, has_edges
from laconic.artifact import PLACED
from laconic.budget import parse_budget
from laconic.core.errors import BrokenPromise, UserError
from laconic.core.transform import Lesson, Model
from laconic.cutting import Reduced, asked, config_of, drawn, recorded, remove, share, stored_bytes, weigh
from laconic.data import Samples, Split
from laconic.elastic import Cut, Stacks, arrange, index_of, refuse_stacks, spread_over, stacks_of
from laconic.journal import Work
from laconic.kernels.place import CPU, here, on
from laconic.measurement import Quality, compare, hardware, load_of, peak_memory, said, sizes, summarize, watch
from laconic.models import Derived, Source
from laconic.nesting import nest
from laconic.pipeline import (
    TUNABLE,
    Applied,
    Log,
    Progress,
    apply_plan,
    batch_of,
    calibration_rows,
    finished_logits,
    fixed_of,
    make_plan,
    menu_of,
    place_parts,
    plan_words,
    priced_again,
    probe_of,
    quiet,
    reload_difference,
    route_plan,
    tune_plan,
    uniform_plan,
)
from laconic.recipe import UNIFORM, Nesting, Recipe, build
from laconic.restoring import restore

# a reloaded model's logits may differ by the order of sums, not more
RELOAD = 1e-4


def versions() -> dict[str, str]:
    """What the result depends on besides the inputs."""
    import transformers

    return {
        "laconic": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def identity_of(
    source: Source, split: Split, recipe: Recipe, budget: Sequence[str], seed: int, plan: Mapping[str, Any] | None, device: str
) -> dict[str, Any]:
    """All that a run's result depends on; a work folder of another identity is refused."""
    return {
        "model": source.hashes(),
        "data": {name: getattr(split, name).sha256 for name in ("calibrate", "search", "certify")},
        "recipe": recipe.resolved(),
        "budget": list(budget),
        "plan": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest() if plan is not None else None,
        "seed": seed,
        "threads": torch.get_num_threads(),
        **({"device": device} if device != "cpu" else {}),
        "versions": versions(),
    }


def pointwise(original: Any, compressed: Any, samples: Samples, *, batch: int) -> Quality:
    """Each prediction over `samples`, both models walked segment by segment."""
    first, second = finished_logits(original, samples.inputs, batch), finished_logits(compressed, samples.inputs, batch)
    return compare(lambda _: next(first).float(), lambda _: next(second).float(), samples, batch=batch)


def quality_of(original: Any, compressed: Any, samples: Samples, *, metric: str, batch: int, seed: int = 0) -> dict[str, Any]:
    """The measured keys over `samples`, both models walked segment by segment."""
    found = pointwise(original, compressed, samples, batch=batch)
    # numbers alone: there is nothing to gain on another device
    with on(CPU):
        return summarize(found, metric=metric, seed=seed)


def plan(source: Source, split: Split, recipe: Recipe, budget: Sequence[str], out: Path, *, seed: int = 0, overwrite: bool = False,
         device: str = "cpu", progress: Progress = quiet, log: Log = print) -> dict[str, Any]:  # fmt: skip
    """The price list and the plan alone; `out` is the file that plan.json goes to."""
    identity = identity_of(source, split, recipe, budget, seed, None, device)
    with on(device), Work(out, identity, overwrite=overwrite, log=log) as work:
        try:
            source = _aligned(_cut(source, split, budget, recipe, seed, None, work, progress, log), split, recipe, work, progress, log)
            made = make_plan(source, split, recipe, budget, seed=seed, work=work, progress=progress, log=log)
        except UserError:
            work.discard()
            raise
        work.discard()
    return made


def compress(
    source: Source,
    split: Split,
    *,
    budget: Sequence[str],
    recipe: Recipe,
    out: Path,
    seed: int = 0,
    plan: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = quiet,
    log: Log = print,
    command: str = "",
) -> dict[str, Any]:
    """Runs everything and returns the certificate. device: what computes, as torch names it. Raises UserError (nothing is left
    half-written) or BrokenPromise (the work stays)."""
    refuse_target(source, out)
    # a number that is not one of the budget is found before anything is hashed or written
    parse_budget(budget, source, needed=recipe.chooses)
    if recipe.order is not None:
        refuse_stacks(source.anatomy)
    started = time.monotonic()
    identity = identity_of(source, split, recipe, budget, seed, plan, device)
    with on(device), Work(out, identity, overwrite=overwrite, log=log) as work, watch() as peak:
        try:
            certificate = _run(source, split, budget, recipe, seed, plan, work, progress, log, command, started, peak)
        except UserError:
            if not work.resumed and work.done("plan") is None:
                work.discard()
            raise
    return certificate


def refuse_target(source: Source, out: Path) -> None:
    """The output must not be the model."""
    if source.path is not None and Path(out).resolve() == source.path.resolve():
        raise UserError(f"the output folder {out} is the model itself; choose another with -o")


def _run(
    source: Source,
    split: Split,
    budget: Sequence[str],
    recipe: Recipe,
    seed: int,
    given: Mapping[str, Any] | None,
    work: Work,
    progress: Progress,
    log: Log,
    command: str,
    started: float,
    peak: Any,
) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    def clock(name: str, since: float) -> None:
        seconds[name] = round(time.monotonic() - since, 3)

    at = time.monotonic()
    if given is not None and given["model"]["hashes"] != source.hashes():
        raise UserError("the plan was made for another model (its hashes differ); make it again with `laconic plan`")
    original, source = source, _cut(source, split, budget, recipe, seed, given, work, progress, log)
    source = _aligned(source, split, recipe, work, progress, log)
    source = restore(source, split, recipe, budget, seed=seed, work=work, progress=progress, log=log)
    if given is not None:
        plan = dict(given) | ({"cut": source.record} if isinstance(source, Reduced) else {})
        plan["predicted"] = plan["predicted"] | priced_again(source, plan)
    elif (journalled := work.done("plan")) is not None:
        plan = journalled["plan"]
    else:
        plan = make_plan(source, split, recipe, budget, seed=seed, work=work, progress=progress, log=log)
        work.finish("plan", {"plan": plan})
    clock("plan", at)
    at = time.monotonic()
    plan, applied = _judged(source, split, budget, recipe, seed, plan, given is None, work, progress, log)
    clock("apply", at)
    at = time.monotonic()
    stacks = None
    if recipe.nest is not None:
        applied, stacks = _nested(source, split, budget, recipe, recipe.nest, plan, applied, work, progress)
    applied = _tuned(source, split, recipe, seed, plan, applied, stacks, work, progress, log)
    if recipe.route is not None:
        applied = route_plan(source, split.calibrate.inputs, applied, build(recipe.route), seed=seed, work=work, progress=progress)
        if applied.bytes != plan["predicted"]["bytes"]:
            raise ValueError(f"the routed result holds {applied.bytes} bytes where the plan says {plan['predicted']['bytes']}")
    placed: dict[str, Any] = {}
    if recipe.decode is not None:
        rows = calibration_rows(source, split)
        placed = place_parts(source, rows, applied, build(recipe.decode), seed=seed, work=work, progress=progress)
        plan["notes"] += (work.done("placed") or {})["notes"]
    beside = sum(t.numel() * t.element_size() for t in placed.values())
    clock("tune", at)
    at = time.monotonic()
    index, ranks = _ordered(source, split, recipe, applied, stacks, work, progress)
    clock("order", at)
    at = time.monotonic()
    progress("writing", 0, 1, str(work.out))
    for note in applied.notes:
        log(note)
    plan["notes"] = list(dict.fromkeys([*plan["notes"], *applied.notes]))
    files = _files(source, plan, recipe, applied, placed)
    if index is not None:
        files["elastic.json"] = _json(index)
    hashes = work.assemble(files, applied.parts, ranks=ranks)
    written = _written(work, source, split)
    difference = reload_difference(written, applied, probe_of(source, split.calibrate.inputs))
    if difference > RELOAD:
        raise BrokenPromise(
            f"what was written differs from what was searched by {difference:.2e} of its norm (bound {RELOAD:g}); {work.assembled} is kept"
        )
    clock("write", at)
    at = time.monotonic()
    progress("measuring", 0, 1, "held-out data")
    found = quality_of(original, written, split.certify, metric=split.metric, batch=batch_of(source), seed=seed)
    sizes_below = _sizes_below(original, split, index, seed, work, progress) if index is not None else []
    load = multiplied(written, split) if recipe.route is not None else None
    clock("measure", at)
    size = sizes(applied.bytes + beside, plan["model"]["bytes"], source.parameters)
    details = found.pop("details") | size.pop("details")
    hashes = dict(sorted(hashes.items()))
    certificate = {
        "format": 1,
        "model": plan["model"],
        "budget": plan["budget"],
        "recipe": recipe.resolved(),
        "seed": seed,
        "data": split.record,
        "quality": found | size,
        "details": details,
        **size,
        **({"elastic": sizes_below} if index is not None else {}),
        **({"multiplications": load} if load is not None else {}),
        "files": hashes,
        "plan_sha256": hashes["plan.json"],
        "reload": {"ok": True, "difference": difference},
        "replay": command,
        "versions": versions(),
    }
    seconds["total"] = round(time.monotonic() - started, 3)
    measurements = {
        "seconds": seconds,
        "peak_memory_bytes": max(peak.bytes, peak_memory()),
        "hardware": hardware(),
        "details": {"peak_memory_bytes": {"unit": "bytes", "n": 1, "what": "process tree of the compression"}},
    }
    work.publish({
        "certificate.json": _json(certificate),
        "measurements.json": _json(measurements),
        "README.md": model_card(source, certificate).encode(),
    })  # fmt: skip
    progress("writing", 1, 1, str(work.out))
    return certificate | {"measurements": measurements}


def _given(source: Source) -> Source:
    """The model that was given, which all is measured against."""
    return source.original if isinstance(source, Derived) else source


def _aligned(source: Source, split: Split, recipe: Recipe, work: Work, progress: Progress, log: Log) -> Source:
    """The model as it is, or rewritten along its edges as the recipe says."""
    if (aligning := recipe.align) is None:
        return source
    made = None
    if aligning.needed or has_edges(source):
        inputs, method = calibration_rows(source, split), build(aligning.method)
        made = align(source, inputs, aligning, method, batch=batch_of(source), work=work, progress=progress)
    if made is None or not (made.record["moves"] or made.parts):
        if aligning.needed:
            raise UserError(f"recipe {recipe.name} finds no edge of this model that it can act on; take another recipe")
        note = f"{aligning.method} finds no edge of this model that it can act on, and nothing was moved"
        log(note)
        source.notes = tuple(dict.fromkeys((*source.notes, note)))
        return source
    for note in made.notes:
        log(note)
    moves = len(made.record["moves"])
    done = f"rewritten along {moves} edges" if moves else f"{len(made.parts)} parts in their places"
    log(f"{done}; logits differ by {made.record['difference']:.1e} of their norm")
    return made


def _cut(
    source: Source,
    split: Split,
    budget: Sequence[str],
    recipe: Recipe,
    seed: int,
    given: Mapping[str, Any] | None,
    work: Work,
    progress: Progress,
    log: Log,
) -> Source:
    """The model as it is, or without the channels that the recipe's cut takes away. As many go of each group, or those of least worth
    wherever they are: where the recipe judges both are done, and the better at the output is taken."""
    if (cutting := recipe.cut) is None:
        return source
    if recipe.nest is not None and (parse_budget(budget, source, needed=False).bytes or math.inf) >= stored_bytes(source, {}):
        return source
    batch, method = batch_of(source), build(cutting.method)
    inputs = drawn(source, calibration_rows(source, split), cutting, seed)
    if given is not None:
        weighed, wanted = asked(source, cutting, given["cut"])
        reduced = remove(
            source, inputs, cutting, method, weighed.groups, wanted, batch=batch, prefix="cut/given", work=work, progress=progress
        )
        reduced.record = recorded(weighed, cutting, wanted, given["cut"]["share"], given["cut"]["judged"])
        return reduced
    weighed = weigh(source, inputs, cutting, method, batch=batch, work=work, progress=progress)
    if not weighed.groups:
        name, why = next(iter(weighed.left.items()))
        raise UserError(f"recipe {recipe.name} finds no channels that can be cut in this model ({name}: {why}); take another recipe")
    whole = stored_bytes(source, {})
    bound = parse_budget(budget, source).bytes if cutting.keep is None else int(cutting.keep * whole)
    assert bound is not None
    plans = {how: share(source, weighed, bound, even=how == "even") for how in (("even", "ranked") if recipe.judge else ("even",))}
    made = {
        how: remove(source, inputs, cutting, method, weighed.groups, gone, batch=batch, prefix=f"cut/{how}", work=work, progress=progress)
        for how, gone in plans.items()
    }
    kls = {how: _kl_of(source, one, split, f"cut/{how}", work, progress) for how, one in made.items()} if len(made) > 1 else {}
    judged = [{"share": how, "bytes": stored_bytes(source, made[how].shapes), "kl": kl} for how, kl in kls.items()]
    taken = min(kls, key=kls.__getitem__) if kls else "even"
    made[taken].record = recorded(weighed, cutting, plans[taken], taken, judged)
    log(_said(made[taken].record, judged))
    return made[taken]


def _said(record: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> str:
    gone, had = sum(len(g["gone"]) for g in record["groups"]), sum(g["channels"] for g in record["groups"])
    how = "as many of each group" if record["share"] == "even" else "those of least worth wherever they are"
    kls = ", ".join(f"{entry['share']} {entry['kl']:.4g}" for entry in judged)
    return f"{gone:,} of {had:,} coupled channels go, {how}" + (f" (KL on the search data: {kls})" if kls else "")


def _nested(
    source: Source,
    split: Split,
    budget: Sequence[str],
    recipe: Recipe,
    nesting: Nesting,
    plan: dict[str, Any],
    applied: Applied,
    work: Work,
    progress: Progress,
) -> tuple[Applied, Stacks]:
    """The applied model with its channels in nested slices, and which tensors have theirs together. The budget bounds the largest size."""
    bound = parse_budget(budget, source, needed=False).bytes
    if bound is not None and applied.bytes > bound:
        raise UserError(
            f"the budget of {bound:,} bytes is below the model's {applied.bytes:,}, and recipe {recipe.name} has no `cut` that makes it "
            "smaller; give it one, or ask for size=100%"
        )
    rows = calibration_rows(source, split)
    applied, plan["nest"] = nest(
        source, rows, applied, nesting, build(nesting.method), batch=batch_of(source), work=work, progress=progress
    )  # fmt: skip
    together = {group["tensors"][0]: group["tensors"] for group in plan["nest"]["groups"]}
    return applied, stacks_of(list(together), applied.view.packed, together)


def _ordered(
    source: Source, split: Split, recipe: Recipe, applied: Applied, stacks: Stacks | None, work: Work, progress: Progress
) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """elastic.json and the place of each tensor in the files, where the recipe asks for an order and something is held in parts."""
    if recipe.order is None:
        return None, {}
    if stacks is None:
        segments = source.anatomy.segments()
        inside = [segment for segment in segments if segment.name] or segments
        names = [site.tensors["weight"].name for segment in inside for site in segment.sites]
        stacks = stacks_of(names, applied.view.packed)

    def once(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (found := work.done(key)) is None:
            found = make()
            work.finish(key, found)
        return found

    inputs = split.search.inputs[: recipe.order_rows] if source.task == "text" else split.search.inputs
    order = arrange(
        _given(source), applied.view, applied.view.packed, stacks, inputs, build(recipe.order),
        batch=batch_of(source), shelf=work.folder / "order", once=once, progress=progress,
    )  # fmt: skip
    return index_of(stacks, order, applied.bytes, source.parameters)


def _sizes_below(source: Source, split: Split, index: Mapping[str, Any], seed: int, work: Work, progress: Progress) -> list[dict[str, Any]]:
    """Quality on the certify data of some sizes that the written result can be cut to, the least among them."""
    found = []
    for number, limit in enumerate(limits := spread_over(index)):
        progress("measuring", number, len(limits), f"cut to {limit:,} bytes")
        cut = _written(work, source, split, limit)
        quality = quality_of(source, cut, split.certify, metric=split.metric, batch=batch_of(source), seed=seed)
        quality.pop("details")
        found.append({"bytes": limit, "bits_per_weight": limit * 8 / source.parameters, **quality})
    return found


def multiplied(written: Any, split: Split) -> dict[str, Any]:
    """What a routed result, opened and run once, multiplies for one input, counted over the certify data."""
    model = written.load(torch.float32)
    return said(*load_of(model, here(split.certify.inputs).split(batch_of(written)), written.task), written.task)


def _written(work: Work, source: Source, split: Split, limit: int | None = None) -> Any:
    """What was assembled, opened as a stream of segments; an elastic result cut to `limit` bytes."""
    from laconic.artifact import stream

    # as whoever opens it will: by the processor
    with on(CPU):
        written = stream(work.assembled, limit=limit)
        if source.traced:
            written.trace(split.calibrate.inputs[:1], split.given)
    return written


def _judged(
    source: Source,
    split: Split,
    budget: Sequence[str],
    recipe: Recipe,
    seed: int,
    plan: dict[str, Any],
    judge: bool,
    work: Work,
    progress: Progress,
    log: Log,
) -> tuple[dict[str, Any], Applied]:
    """The solved plan applied; where the recipe judges, also the best uniform plan of its menu; the better at the output is taken."""
    inputs = calibration_rows(source, split)
    applied = apply_plan(source, inputs, plan, work=work, progress=progress, prefix="solved")
    if not (judge and recipe.judge and recipe.choices and recipe.search != UNIFORM):
        return plan, applied
    menu = menu_of(plan)
    bound = parse_budget(budget, source, needed=recipe.chooses)
    other = uniform_plan(menu, bound)
    solved_kl = _kl(source, applied, split, "solved", work, progress)
    plan["judged"] = [{"plan": "solved", "bytes": applied.bytes, "kl": solved_kl}]
    if other is None:
        return plan, applied
    kept = fixed_of(plan)
    uniform = plan_words(source, split, recipe, budget, bound, menu, other, kept, seed, frontier=plan["pareto"])
    progress("compressing", 0, 1, "the uniform plan, to compare with")
    second = apply_plan(source, inputs, uniform, work=work, progress=progress, prefix="uniform")
    uniform_kl = _kl(source, second, split, "uniform", work, progress)
    plan["judged"].append({"plan": "uniform", "bytes": second.bytes, "kl": uniform_kl})
    if uniform_kl < solved_kl:
        log(f"the uniform plan is better at the output (KL {uniform_kl:.4g} against {solved_kl:.4g} nats a token) and is taken")
        uniform["judged"] = plan["judged"]
        uniform["notes"] = [*plan["notes"], "the solved plan lost to the best uniform plan on the search data; the uniform plan was taken"]
        return uniform, second
    return plan, applied


def _tuned(
    source: Source,
    split: Split,
    recipe: Recipe,
    seed: int,
    plan: dict[str, Any],
    applied: Applied,
    stacks: Stacks | None,
    work: Work,
    progress: Progress,
    log: Log,
) -> Applied:
    """What the recipe learns, over the whole model or part by part, taken where the search data say that it is better; of a nested model,
    on the mean over its sizes."""
    if recipe.tune is None:
        return applied
    lesson: Lesson = build(recipe.tune)
    if isinstance(lesson.scope, Model) and source.parameters > TUNABLE:
        return _noted(plan, log, applied, f"{recipe.tune} was left out: it holds the whole model and is for {TUNABLE:,} weights at most")
    name = applied.parts[0].partition("/")[0]
    before = _kl(source, applied, split, name, work, progress, stacks)
    if not plan["judged"]:
        plan["judged"].append({"plan": name, "bytes": applied.bytes, "kl": before})
    tuned = tune_plan(
        source,
        calibration_rows(source, split, lesson),
        applied,
        lesson,
        seed=seed,
        work=work,
        progress=progress,
        teacher=_given(source),
    )
    after = _kl(source, tuned, split, "tuned", work, progress, stacks)
    plan["judged"].append({"plan": "tuned", "bytes": tuned.bytes, "kl": after})
    if after < before:
        return tuned
    return _noted(plan, log, applied, f"{recipe.tune} did not lower KL on the search data ({after:.4g} from {before:.4g}) and was dropped")


def _noted(plan: dict[str, Any], log: Log, applied: Applied, note: str) -> Applied:
    """The model as it was, with a sentence in plan and log that says why."""
    plan["notes"].append(note)
    log(note)
    return applied


def _kl(source: Source, applied: Applied, split: Split, name: str, work: Work, progress: Progress, stacks: Stacks | None = None) -> float:
    """KL on the search data; of a nested model the mean over its sizes, all layers alike."""
    if stacks is None:
        return _kl_of(_given(source), applied.view, split, name, work, progress)
    kls = []
    for count in range(1, max(map(len, stacks.bytes.values())) + 1):
        counts = {stack: min(count, len(sizes)) for stack, sizes in stacks.bytes.items()}
        narrower = Cut(applied.view, applied.view.packed, counts, stacks)
        kls.append(_kl_of(_given(source), narrower, split, f"{name}/{count}", work, progress))
    return sum(kls) / len(kls)


def _kl_of(source: Source, changed: Any, split: Split, name: str, work: Work, progress: Progress) -> float:
    """KL on the search data, journalled."""
    if (found := work.done(f"judge/{name}")) is None:
        progress("judging", 0, 1, f"the {name} plan on the search data")
        quality = quality_of(source, changed, split.search, metric=split.metric, batch=batch_of(source))
        found = {"kl": quality["kl_mean"]}
        work.finish(f"judge/{name}", found)
    return float(found["kl"])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _files(source: Source, plan: Mapping[str, Any], recipe: Recipe, applied: Applied, placed: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """Everything beside the weights that the result's hashes depend on."""
    files: dict[str, bytes | Path] = {path.name: path for path in source.companions() if path.name not in ("config.json", "README.md")}
    held: dict[str, Any] = {"quant_method": "laconic", "format": 1, "forms": applied.forms}
    if placed_parts := {**(source.placed if isinstance(source, Aligned) else {}), **applied.view.placed}:
        held["placed"] = placed_parts
    if recipe.decode is not None:
        held["decoder"] = recipe.decode
        files[PLACED] = save({name: tensor.cpu() for name, tensor in placed.items()})
    shapes = {name: list(shape) for name, shape in sorted(source.shapes.items())} if isinstance(source, Reduced) else {}
    if source.path is not None:
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        if isinstance(source, Reduced):
            config, shapes = config_of(source, config)
    if shapes:
        held["shapes"] = shapes
    if source.path is not None:
        config["quantization_config"] = held
        files["config.json"] = _json(config)
    else:
        files["laconic.json"] = _json({"factory": source.spec, **held})
    files["plan.json"] = _json(plan)
    files["recipe.yaml"] = yaml.safe_dump(recipe.resolved(), sort_keys=False).encode()
    return files


def _ends(quality: Mapping[str, Any]) -> str:
    """The interval of the mean KL in brackets; a single sequence has none."""
    return f" ({quality['kl_mean_low']:.5f} to {quality['kl_mean_high']:.5f})" if "kl_mean_low" in quality else ""


def _elastic_lines(certificate: Mapping[str, Any]) -> list[str]:
    """What the smaller sizes of an elastic result are worth."""
    if not certificate.get("elastic"):
        return []
    lines = ["It loads at any size from the first line's on: `laconic.load(folder, budget=\"size=2MB\")`.", "",
             "| bytes | bits a weight | KL | same first choice |", "| --- | --- | --- | --- |"]  # fmt: skip
    for one in [*certificate["elastic"], {**certificate["quality"], "bytes": certificate["bytes"]}]:
        bits = one["bytes"] * 8 / certificate["model"]["parameters"]
        lines.append(f"| {one['bytes']:,} | {bits:.3f} | {one['kl_mean']:.5f} | {one['top1_agreement']:.2%} |")
    return [*lines, ""]


def model_card(source: Source, certificate: Mapping[str, Any]) -> str:
    """README.md of the result: front matter, command, data, numbers."""
    quality = certificate["quality"]
    name = source.spec or "nano"
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        "base_model_relation: quantized",
        "library_name: transformers",
        "tags: [laconic, compressed]",
        "---",
        f"# {name}, compressed by laconic",
        "",
        f"{certificate['bits_per_weight']:.3f} stored bits a weight over all parameters, scales and indices included "
        f"({certificate['bytes']:,} bytes; the original has {certificate['bytes_original']:,}).",
        "",
        "| measured on held-out data | original | compressed |",
        "| --- | --- | --- |",
    ]
    if "perplexity" in quality:
        recovered = quality["perplexity_original"] / quality["perplexity"]
        lines.append(f"| perplexity (recovery {recovered:.1%}) | {quality['perplexity_original']:.4f} | {quality['perplexity']:.4f} |")
    if "accuracy" in quality:
        lines.append(f"| accuracy | {quality.get('accuracy_original', float('nan')):.4f} | {quality['accuracy']:.4f} |")
    lines += [
        f"| KL to the original, nats a prediction | 0 | {quality['kl_mean']:.5f}{_ends(quality)} |",
        f"| same first choice as the original | 100 % | {quality['top1_agreement']:.2%} |",
        "",
        "Made with",
        "",
        "```",
        certificate["replay"],
        "```",
        "",
        *_elastic_lines(certificate),
        "Load it with `laconic.load(folder)`, or with transformers after `import laconic`. All that was measured, with hashes of the",
        "data and of the files, is in `certificate.json`; the choice for every tensor is in `plan.json`.",
        "",
    ]
    return "\n".join(lines)
