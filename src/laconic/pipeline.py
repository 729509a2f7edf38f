"""From a model and a budget to a smaller model: price, solve, apply, pack, check. The only code that edits weights.

Each arrow is a function of values, and each value is journalled, so a killed run goes on where it stood."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic import __version__
from laconic.artifact import holdable, stand
from laconic.budget import parse_budget
from laconic.calibration import (
    KEPT,
    PRICING,
    Shelf,
    Shelved,
    Walk,
    answer_of,
    as_held,
    as_if_once,
    fed,
    joined,
    kept_tensor,
    observed,
    release,
)
from laconic.core.decoder import Decoder
from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Measuring, Menu, Plan, Row, cheapest
from laconic.core.packed import Dense, Packed, Soft, Transposed, below, restore, stored_class
from laconic.core.part import Part, Rounding, restore_part
from laconic.core.router import Routed, Router, Settling
from laconic.core.site import Anatomy, Embedding, Segment, Site, Sublayer
from laconic.core.statistic import Fisher, Gram, LookupFisher, Lookups, Statistic
from laconic.core.transform import Change, Lesson, Model, Objective, Transform, Window
from laconic.decoding import body_of
from laconic.kernels.obs import predicted_loss
from laconic.kernels.pairs import narrowly
from laconic.kernels.place import CPU, device, here
from laconic.kernels.threads import suited
from laconic.measurement import outputs
from laconic.models import Source, stored_paths
from laconic.narrow import narrowed
from laconic.recipe import UNIFORM, Recipe, build, level_of, level_words
from laconic.reconstruction import Reconstruction
from laconic.routing import begin, foreseen, install, look, parts_of
from laconic.trials import AS_IS, Recorded, Trials, form_key
from laconic.tuning import Targets, tune

Progress = Callable[[str, int, int, str], None]
Log = Callable[[str], None]

# why a tensor is kept whose values are not
LEARNED, ANEW = "learned in the same bytes", "learned, and held in a form of the routed part"
# of a recipe that acts on a smaller share of the weights the user is told
SCANT = 0.1
UNIT, PREDICTED, UNPRICED = "nats/token", "model output, second order", "not priced"


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A Progress that shows nothing."""


class Parts:
    """The model as it stands: tensors of finished stages from their forms, everything else from the original."""

    def __init__(self, source: Any, work: Any) -> None:
        self.source, self.work = source, work
        # what a Source's `fill` looks at besides `read`
        self.tied, self._computed = source.tied, source._computed
        self.held: dict[str, str] = {}
        self.forms: dict[str, Any] = {}
        # what stands in the place of modules that are gone, by path
        self.placed: dict[str, Any] = {}
        self.cached: tuple[str, dict[str, Tensor]] = ("", {})
        # layers compute as those of the written result will
        self.as_written = False

    @property
    def anatomy(self) -> Anatomy:
        return self.source.anatomy  # type: ignore[no-any-return]

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Take a finished stage in."""
        self.forms.update(value["forms"])
        self.placed.update(value.get("placed", {}))
        self.held.update(dict.fromkeys([*value["forms"], *value["kept"]], key))

    def skeleton(self) -> nn.Module:
        bare: nn.Module = self.source.skeleton()
        # of what is gone zeros are held; what is routed runs in parts
        made = _parts(self.placed)
        install(bare, {path: part for path, part in made.items() if isinstance(part, Routed)})
        rounded(bare, "", made)
        return bare

    def _tensors(self, key: str) -> dict[str, Tensor]:
        if self.cached[0] != key:
            self.cached = (key, self.work.tensors(key))
        return self.cached[1]

    def packed(self, name: str) -> Packed | None:
        """The form of a stored tensor, None where it has none."""
        if name not in self.forms:
            return None
        return restore(self.forms[name], below(self._tensors(self.held[name]), name))

    def read(self, name: str) -> Tensor:
        if (form := self.packed(name)) is not None:
            return form.dense()
        if name in self.held:
            return self._tensors(self.held[name])[name]
        return self.source.read(name)  # type: ignore[no-any-return]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if (form := self.packed(name)) is not None:
            return form.rows(slice(start, stop))
        if name in self.held:
            return self._tensors(self.held[name])[name][start:stop]
        return self.source.read_rows(name, start, stop)  # type: ignore[no-any-return]

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Sequence[str] = ()) -> None:
        Source.fill(self, module, prefix, dtype, skip=skip)  # type: ignore[arg-type]
        for path, layer in module.named_modules():
            name = ".".join(part for part in (prefix, path, "weight") if part)
            if (stored := self.tied.get(name, name)) in self.forms and name not in skip and stored not in skip:
                form = self.packed(stored)
                assert form is not None
                if self.as_written and holdable(layer):
                    as_held(layer, form)
                else:
                    fed(layer, form)
        self.cached = ("", {})


def _parts(placed: Mapping[str, Any]) -> dict[str, Part]:
    return {path: restore_part(described) for path, described in placed.items()}


def rounded(module: nn.Module, segment: str, parts: Mapping[str, Part]) -> bool:
    """Puts those parts that round where they stand in a segment's module, or in the whole model's (""); whether there are any."""
    prefix = f"{segment}." if segment else ""
    rounding = {path: part for path, part in parts.items() if path.startswith(prefix) and isinstance(part, Rounding)}
    for path, part in rounding.items():
        stand(module, path.removeprefix(prefix), part)
    return bool(rounding)


# ---- what is offered


class Offer(NamedTuple):
    """One (site, method, level) with its built transform."""

    site: Site
    method: str
    transform: Transform
    level: Any


def offers(source: Any, recipe: Recipe) -> list[Offer]:
    """Everything the recipe may do, site by site."""
    import re

    built = [(choice, build(choice.method)) for choice in recipe.choices]
    found = []
    for site in (*source.anatomy.sites(), *source.anatomy.sublayers()):
        if re.fullmatch(recipe.keep, site.name):
            continue
        for choice, transform in built:
            if choice.offers(site) and isinstance(site.kind, transform.acts_on):
                seen = set()
                for words in choice.levels:
                    level = level_of(transform, words)
                    # a group wider than the row is the whole row: the same level twice is offered once
                    if (size := transform.stored(site, level), str(level)) not in seen:
                        seen.add((size, str(level)))
                        found.append(Offer(site, choice.method, transform, level))
    return found


def kept_rows(source: Any, offered: Sequence[Offer], where: str) -> list[Row]:
    """Where something larger may go (a sub-layer), its tensors that no offer settles alone may also stay as they are: a row for each."""
    alone = {name for offer in offered if not isinstance(offer.site.kind, Sublayer) for name in offer.site.covers}
    whole = dict.fromkeys(name for offer in offered for name in sorted(offer.site.covers) if name not in alone)
    sizes = kept_bytes(source, set(source.infos) - set(whole))
    return [
        Row(frozenset({name}), AS_IS, {}, Cost(size), Damage(0.0, UNIT, where), "", math.prod(source.infos[name].shape))
        for name, size in sizes.items()
    ]


def calibration_rows(source: Any, split: Any, lesson: Lesson | None = None) -> Tensor:
    """The inputs that statistics are taken from. Of images 256 are enough: every position of a convolution is a row of its Gram. A lesson
    on parts of a model, which sees each image many times, has 1,024."""
    count = 256 if lesson is None or isinstance(lesson.scope, Model) else 1024
    return split.calibrate.inputs if source.task == "text" else split.calibrate.inputs[:count]  # type: ignore[no-any-return]


def chosen_by(source: Any, plan: Mapping[str, Any]) -> dict[str, Offer]:
    """What a plan chose, by site. UserError where it names a site that the model does not have."""
    sites = {site.name: site for site in (*source.anatomy.sites(), *source.anatomy.sublayers())}
    chosen = {}
    for choice in plan["choices"]:
        if choice["site"] not in sites:
            raise UserError(f"the plan names {choice['site']}, which this model does not have; make the plan again for this model")
        transform = build(choice["method"])
        chosen[choice["site"]] = Offer(sites[choice["site"]], choice["method"], transform, level_of(transform, choice["level"]))
    return chosen


def kept_bytes(source: Any, covered: set[str]) -> dict[str, int]:
    """Bytes of every stored tensor that no site covers, as it will be stored: floating point as bf16."""
    kept = {}
    for name, info in source.infos.items():
        if name in covered:
            continue
        count = math.prod(info.shape)
        kept[name] = count * (2 if info.dtype.is_floating_point else info.dtype.itemsize)
    return kept


def oriented(site: Site, weight: Tensor) -> Tensor:
    """A weight between the way it is stored and the (n, m) that methods see; the same call goes back."""
    return weight.T.contiguous() if site.transposed else weight


def reconstructed(change: Change, site: Site) -> Tensor:
    """The site's weight after the change, matrix view."""
    return change.hold[site.tensors["weight"]].dense().reshape(site.matrix)


def damage_of(site: Site, weight: Tensor, change: Change, stats: Mapping[Statistic, Tensor]) -> float:
    """Nats a token at the output, to second order, of one change: half the Fisher information times the mean squared output error; for a
    table also its lookups."""
    delta = reconstructed(change, site) - weight.reshape(site.matrix).float()
    value = 0.0
    if Gram() in stats and Fisher() in stats:
        value += predicted_loss(delta, stats[Gram()], stats[Fisher()])
    if Lookups() in stats:
        moved = delta.double().square() @ stats[LookupFisher()].double()
        value += 0.5 * float((stats[Lookups()].double() * moved).sum())
    return value


# ---- price


def price(
    source: Any, inputs: Tensor | None, recipe: Recipe, *, seed: int, work: Any, progress: Progress, batch: int, keep: bool = False
) -> tuple[list[Row], dict[str, dict[Statistic, Tensor]]]:
    """The price list. Without `inputs` (uniform recipes) only bytes are known; with them each row's damage at the output is predicted from
    one walk forward and back. Also returns the statistics of sites outside the layers, which `apply` needs again. keep: every form that is
    made to be priced is journalled too, one part file for each, so that plans can be tried without compressing again."""
    offered = offers(source, recipe)
    if inputs is None:
        rows = [_row(o, Damage(math.nan, UNIT, UNPRICED)) for o in offered]
        return rows + kept_rows(source, offered, UNPRICED), {}
    by_site: dict[str, list[Offer]] = {}
    for offer in offered:
        by_site.setdefault(offer.site.name, []).append(offer)
    # a module that was given is in memory: one pass prices all of it
    whole = source.traced
    segments = (joined(source.anatomy.segments()),) if whole else source.anatomy.segments()
    if all(work.done(f"price/{s.name}") for s in segments):
        rows = [_from_words(r) for s in segments for r in work.done(f"price/{s.name}")["rows"]]
        if not keep or all(work.done(form_key(row)) for row in rows):
            return rows + kept_rows(source, offered, PREDICTED), _load_stats(work)
    walk = Walk(source, inputs, batch=batch, shelf=work.folder / "shelf", whole=whole)
    walk.begin()
    generator = torch.Generator().manual_seed(seed)
    rows_of: dict[str, list[Row]] = {}
    rest: dict[str, dict[Statistic, Tensor]] = {}
    count = 0

    found: list[Row] = []

    def take_in(offer: Offer, change: Change, damage: float) -> None:
        row = _row(offer, Damage(damage, UNIT, PREDICTED))
        found.append(row)
        if keep and work.done(form_key(row)) is None:
            work.finish(form_key(row), *_formed(change, offer.site))

    def walked(done: int, total: int) -> None:
        progress("reading the model", done, total, "forward and back once")

    wants = tuple(dict.fromkeys([*PRICING, *(statistic for offer in offered for statistic in offer.transform.wants)]))
    for segment, _, stats in walk.backward(wants, generator, walked):
        found.clear()
        for site in segment.sites:
            have = stats.get(site.name, {})
            if not have and "expert" in site.context:
                have = as_if_once(stats, segment, site, inputs.numel())
            if not segment.name:
                rest[site.name] = have
            if (group := by_site.get(site.name)) is None:
                continue
            weight = oriented(site, source.read(site.tensors["weight"].name).float())
            with suited(weight.numel()):
                for offer, change in _changes(group, site, weight, stats):
                    count += 1
                    progress("pricing", count, len(offered), site.name)
                    _same_bytes(offer, change)
                    take_in(offer, change, damage_of(site, weight, change, have))
        for site in inside(source, segment):
            for offer in by_site.get(site.name, ()):
                count += 1
                progress("pricing", count, len(offered), site.name)
                change = offer.transform(site, {role: source.read(t.name) for role, t in site.tensors.items()}, {}, offer.level)
                writers = [writer for writer in segment.sites if writer.name in site.context["writers"]]
                weights = (oriented(writer, source.read(writer.tensors["weight"].name).float()) for writer in writers)
                lost = [damage_of(w, weight, change, stats.get(w.name, {})) for w, weight in zip(writers, weights, strict=True)]
                _same_bytes(offer, change)
                take_in(offer, change, sum(lost))
        rows_of[segment.name] = list(found)
        if not segment.name and work.done("stats") is None:
            there = {f"{n}|{type(k).__name__}": v for n, s in rest.items() for k, v in s.items() if k in PRICING}
            work.finish("stats", {"sites": sorted(rest)}, there)
        if work.done(f"price/{segment.name}") is None:
            work.finish(f"price/{segment.name}", {"rows": [_words(row) for row in found]})
    walk.shelf.clear() if walk.shelf else None
    return [row for segment in segments for row in rows_of[segment.name]] + kept_rows(source, offered, PREDICTED), rest


def inside(source: Any, segment: Segment) -> list[Site]:
    """The sub-layers of a segment."""
    return [site for site in source.anatomy.sublayers() if segment.name and site.name.startswith(f"{segment.name}.")]


def _with_gram(site: Site, found: Mapping[Statistic, Tensor], wants: Sequence[Statistic]) -> dict[Statistic, Tensor]:
    """An untied table has one-hot inputs: their Gram is diagonal, so nothing is correlated and columns of its rows stand alone. Of all
    else that is wanted of a table's inputs, nothing was seen."""
    if not isinstance(site.kind, Embedding):
        return dict(found)
    return {s: torch.eye(site.matrix[1]) if s == Gram() else s.finish(s.init(site)) for s in wants if s not in found} | dict(found)


def _changes(
    group: Sequence[Offer], site: Site, weight: Tensor, stats: Mapping[str, Mapping[Statistic, Tensor]]
) -> Iterator[tuple[Offer, Change]]:
    """Every offer at one site with its Change, the levels of one method together."""
    for method in dict.fromkeys(offer.method for offer in group):
        same = [offer for offer in group if offer.method == method]
        transform = same[0].transform
        levels = [offer.level for offer in same]
        own = {site.name: _with_gram(site, stats.get(site.name, {}), transform.wants)}
        yield from zip(same, transform.several(site, {"weight": weight}, observed(own, site, transform.wants), levels), strict=True)


def _load_stats(work: Any) -> dict[str, dict[Statistic, Tensor]]:
    kinds = {type(s).__name__: s for s in PRICING}
    found: dict[str, dict[Statistic, Tensor]] = {}
    for key, value in work.tensors("stats").items():
        site, _, kind = key.rpartition("|")
        found.setdefault(site, {})[kinds[kind]] = value
    return found


def _same_bytes(offer: Offer, change: Change) -> int:
    held = sum(packed.nbytes for packed in change.hold.values())
    if held != offer.transform.stored(offer.site, offer.level):
        raise ValueError(
            f"{offer.method} at {offer.site.name} holds {held} bytes, not the {offer.transform.stored(offer.site, offer.level)} it names"
        )
    return held


def _row(offer: Offer, damage: Damage) -> Row:
    cost = Cost(offer.transform.stored(offer.site, offer.level))
    return Row(offer.site.covers, offer.method, level_words(offer.level), cost, damage, offer.site.name, math.prod(offer.site.shape))


def _words(row: Row) -> dict[str, Any]:
    damage = {"value": None if math.isnan(row.damage.value) else row.damage.value, "unit": row.damage.unit, "where": row.damage.where}
    return {
        "site": row.site,
        "covers": sorted(row.covers),
        "parameters": row.parameters,
        "method": row.method,
        "level": dict(row.level),
        "bytes": row.cost.bytes,
        "damage": damage,
    }


def _from_words(words: Mapping[str, Any]) -> Row:
    damage = words["damage"]
    value = math.nan if damage["value"] is None else float(damage["value"])
    found = Damage(value, damage["unit"], damage["where"])
    return Row(frozenset(words["covers"]), words["method"], words["level"], Cost(words["bytes"]), found, words["site"], words["parameters"])


# ---- solve


def make_plan(
    source: Any, split: Any, recipe: Recipe, budget: Sequence[str], *, seed: int, work: Any, progress: Progress = quiet, log: Log = print
) -> dict[str, Any]:
    """What, where, at which level, at what price: plan.json's content. Deterministic: no times in it."""
    bound = parse_budget(budget, source, needed=recipe.chooses)
    offered = offers(source, recipe)
    covered = {name for offer in offered for name in offer.site.covers}
    if recipe.choices and not covered:
        raise UserError(f"recipe {recipe.name} offers nothing for this model; look at `where`, `kinds` and `keep` in it")
    kept = kept_bytes(source, covered) | held_anew(source, recipe)
    fixed = sum(kept.values()) + sum(beside(source, recipe).values())
    if not covered:
        # all that the recipe does is done elsewhere: what is there is kept
        only = Plan((), fixed, Damage(math.nan, UNIT, UNPRICED))
        made = plan_words(source, split, recipe, budget, bound, Menu((), only.bytes), only, kept, seed, frontier=[])
        if recipe.route is not None:
            progress("reading the model", 0, 1, "what routing will take")
            made["routed"] = foreseen(source, split.search.inputs, build(recipe.route), batch_of(source))
            made["notes"] += made["routed"].pop("notes")
        return made
    needs = recipe.search != UNIFORM
    rows_wanted = recipe.price_rows if source.task == "text" else None
    inputs = calibration_rows(source, split)[:rows_wanted] if needs else None
    # what is impossible is said before the long work, from bytes alone
    bare = Menu(tuple(price(source, None, recipe, seed=seed, work=work, progress=progress, batch=1)[0]), fixed)
    if bound.bytes is not None and cheapest(bare) > bound.bytes:
        least = cheapest(bare)
        raise UserError(
            f"the budget of {bound.bytes:,} bytes is below what recipe {recipe.name} can reach: the least is {least:,} bytes; "
            f"ask for size={least / 1e6:.2f}MB (bits={math.ceil(least * 8e3 / source.parameters) / 1e3:g}) or more"
        )
    search = build(recipe.search)
    if isinstance(search, Measuring):
        row = here(split.search.inputs[:1])
        answer = next(iter(finished_logits(source, row, 1)))
        for measure in search.also():
            measure(answer, answer, None)
    objective = search.asks()
    rows, _ = price(source, inputs, recipe, seed=seed, work=work, progress=progress, batch=batch_of(source), keep=objective is not None)
    menu = Menu(tuple(rows), fixed)
    judge = None if objective is None else Recorded(trials(source, split.search.inputs, objective, work), work)
    plan = search(
        menu, bound, judge=judge, rng=torch.Generator().manual_seed(seed), log=log,
        progress=lambda done, total, note: progress("searching", done, total, note),
    )  # fmt: skip
    made = plan_words(source, split, recipe, budget, bound, menu, plan, kept, seed)
    share = sum(math.prod(source.infos[name].shape) for name in covered) / source.parameters
    if share < SCANT:
        made["notes"].append(f"recipe {recipe.name} acts on {share:.1%} of the weights, the others are kept as they are")
        log(made["notes"][-1])
    return made


def trials(source: Any, inputs: Tensor, objective: Objective, work: Any) -> Trials:
    """A judge of plans over inputs (count, ...) from the forms that pricing kept. A row of it is a sequence of tokens; elsewhere a sample
    says far less, and a row is as many as are run at once."""
    rows = here(inputs).split(1 if source.task == "text" else batch_of(source))

    def original() -> Targets:
        logits = (found for row in rows for found in finished_logits(source, row, row.shape[0]))
        return filed(Shelf(work.folder / "judge", 512 * 1024**2), logits)

    return Trials(source, rows, original, objective, work)


def plan_words(
    source: Any,
    split: Any,
    recipe: Recipe,
    words: Sequence[str],
    bound: Budget,
    menu: Menu,
    plan: Plan,
    kept: Mapping[str, int],
    seed: int,
    frontier: list[dict[str, float]] | None = None,
) -> dict[str, Any]:
    """A Plan as plan.json; the frontier is computed unless given."""
    # a cut model is the original of all that follows, but not of what is said of it
    given = getattr(source, "original", source)
    stage: Mapping[str, Any] = getattr(source, "record", {})
    kept = {**kept, **{name: row.cost.bytes for row in plan.rows if row.method == AS_IS for name in row.covers}}
    return {
        "format": 1,
        "laconic": __version__,
        "model": {
            "spec": source.spec,
            "parameters": source.parameters,
            "bytes": sum(math.prod(i.shape) * i.dtype.itemsize for i in given.infos.values()),
            "bf16_bytes": 2 * source.parameters,
            "hashes": source.hashes(),
        },
        "budget": {"words": list(words), "bytes": bound.bytes},
        "recipe": recipe.resolved(),
        "seed": seed,
        "data": split.record if split is not None else {},
        **({"align" if hasattr(source, "moves") else "cut": stage} if stage else {}),
        "choices": [_words(row) for row in plan.rows if row.method != AS_IS],
        "kept": _learned_words(source, recipe, _kept_words(source, kept)),
        "placed": [{"part": path, "bytes": size, "by": recipe.route or recipe.decode} for path, size in beside(source, recipe).items()],
        "notes": list(getattr(source, "notes", ())),
        "predicted": {
            "bytes": plan.bytes,
            "bits_per_weight": plan.bytes * 8 / source.parameters,
            "damage": None if math.isnan(plan.damage.value) else plan.damage.value,
            # all of a routed model learns at once: a weight, its gradient, two moments and the original's
            "peak_memory_bytes": predicted_memory(source, split, build(recipe.tune) if recipe.tune else None)
            + (24 * source.parameters if recipe.route else 0),
        },
        "menu": [_words(row) for row in menu.rows],
        "pareto": pareto(menu, source.parameters) if frontier is None else frontier,
        "judged": [],
    }


def _kept_words(source: Any, kept: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tensors that no row covers, with their bytes and why."""
    anatomy = source.anatomy
    offered = {site.tensors["weight"].name for site in anatomy.sites()}
    given = getattr(source, "original", source)

    def why(name: str) -> str:
        if name not in given.infos:
            return "held by a part that stands in the model"
        if (before := given.infos[name].shape) != (after := source.infos[name].shape):
            return f"cut from {' x '.join(map(str, before))} to {' x '.join(map(str, after))}"
        flat = len(source.infos[name].shape) < 2
        return "one-dimensional" if flat else "the recipe leaves it" if name in offered else anatomy.why(name)

    return [{"tensor": name, "bytes": size, "why": why(name)} for name, size in sorted(kept.items())]


def _learned_words(source: Any, recipe: Recipe, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept in its bytes, with a word on what a recipe's router learns of it."""
    if recipe.route is None:
        return kept
    under = tuple(f"{path}." for path in beside(source, recipe)) if build(recipe.route).learns == "parts" else ("",)
    learned = {
        entry["tensor"] for entry in kept if entry["tensor"].startswith(under) and source.infos[entry["tensor"]].dtype.is_floating_point
    }
    before = kept_bytes(source, set())
    anew = {name: {"before": before[name], "why": ANEW} for name in held_anew(source, recipe)}
    return [entry | anew.get(entry["tensor"], {"why": LEARNED}) if entry["tensor"] in learned else entry for entry in kept]


def predicted_memory(source: Any, split: Any = None, lesson: Lesson | None = None) -> int:
    """Peak resident bytes of an apply walk: interpreter and libraries; the widest segment in fp32 twice (weights, and a dense copy of a
    form while codes are made), or the widest single tensor outside the layers twice; hidden states of all calibration rows, in and out,
    and the inputs of one segment that are kept over its passes. A lesson on parts: for each weight that learns at once a parameter, its
    gradient, two moments, and two numbers more; and the original's hidden states."""
    segments = [segment for segment in source.anatomy.segments() if segment.name]
    shapes = [[source.infos[t].shape for t in s.tensors if t in source.infos] for s in segments]
    widest = max((sum(math.prod(shape) for shape in some) for some in shapes), default=0)
    single = max(math.prod(i.shape) * (i.dtype.itemsize + 1) for i in source.infos.values())
    states = 0
    if split is not None and segments:
        rows = calibration_rows(source, split)
        tokens = rows.numel() if source.task == "text" else rows.shape[0] * getattr(source.anatomy, "positions", 1)
        widths = [site.matrix[1] for site in segments[0].sites]
        states = 4 * tokens * 2 * min(widths) + min(2 * KEPT, 4 * tokens * (min(widths) + max(widths)))
    if lesson is not None and not isinstance(lesson.scope, Model):
        learning = 6 * 4 * widest * (lesson.scope.blocks if isinstance(lesson.scope, Window) else 1)
        return 500_000_000 + max(widest * 4 * 2 + learning, single * 2) + 2 * states
    return 500_000_000 + max(widest * 4 * 2, single * 2) + states


def priced_again(source: Any, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What an edited plan holds in all: bytes and bits a weight. UserError where it exceeds its own budget."""
    if "cut" in plan:
        # channels that a user takes out of a plan or puts back into it change what the other tensors weigh
        sizes = kept_bytes(source, set())
        plan["kept"][:] = _kept_words(source, {entry["tensor"]: sizes[entry["tensor"]] for entry in plan["kept"]})
    held = sum(entry["bytes"] for entry in plan["kept"]) + _beside(plan)
    chosen = chosen_by(source, plan)
    for choice in plan["choices"]:
        offer = chosen[choice["site"]]
        choice["bytes"] = offer.transform.stored(offer.site, offer.level)
        held += choice["bytes"]
    bound = plan["budget"]["bytes"]
    if bound is not None and held > bound:
        raise UserError(
            f"the plan holds {held:,} bytes, its budget is {bound:,}; choose smaller levels, or make a plan for a larger budget"
        )
    return {"bytes": held, "bits_per_weight": held * 8 / source.parameters}


def pareto(menu: Menu, parameters: int, points: int = 14) -> list[dict[str, float]]:
    """The predicted frontier: least damage at budgets spread between the cheapest and the dearest cover."""
    if not menu.rows or any(math.isnan(row.damage.value) for row in menu.rows):
        return []
    search = build("search.allocate.knapsack(nodes=500)")
    least = cheapest(menu)
    most = least
    dearest: dict[frozenset[str], int] = {}
    for row in menu.rows:
        dearest[row.covers] = max(dearest.get(row.covers, 0), row.cost.bytes)
    most = menu.fixed + sum(dearest.values())
    found = []
    for i in range(points):
        budget = Budget(bytes=round(least * (most / least) ** (i / (points - 1))))
        plan = search(menu, budget, judge=None, rng=torch.Generator(), log=lambda _: None)
        found.append({"bytes": plan.bytes, "bits_per_weight": plan.bytes * 8 / parameters, "damage": plan.damage.value})
    return found


def menu_of(plan: Mapping[str, Any]) -> Menu:
    """The menu that a plan was bought from."""
    return Menu(tuple(_from_words(row) for row in plan["menu"]), sum(fixed_of(plan).values()) + _beside(plan))


def fixed_of(plan: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every tensor that no row of a plan's menu settles."""
    settled = {name for row in plan["menu"] for name in row["covers"]}
    return {entry["tensor"]: entry["bytes"] for entry in plan["kept"] if entry["tensor"] not in settled}


def _beside(plan: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in plan.get("placed", ()))


def uniform_plan(menu: Menu, bound: Budget) -> Plan | None:
    """The best uniform plan of the same menu, None where no single level fits."""
    try:
        return build(UNIFORM)(menu, bound, judge=None, rng=torch.Generator(), log=lambda _: None)  # type: ignore[no-any-return]
    except UserError:
        return None


# ---- apply


class Applied(NamedTuple):
    """A model whose segments are all finished: the keys of its parts, forms by stored name, bytes held, notes, logits of a probe."""

    parts: tuple[str, ...]
    forms: dict[str, Any]
    bytes: int
    notes: tuple[str, ...]
    probe: Tensor
    view: Parts


def batch_of(source: Any) -> int:
    """Sequences (or samples) run at once: two keep what small layers hand on in a core's cache, wide layers are busy with one."""
    if source.task != "text":
        return 64
    return 2 if source.parameters < 100_000_000 else 1


def in_bf16(source: Any) -> bool:
    """Whether every matrix of a model is stored in bf16: inputs of products are then worth no more digits while methods look at them."""
    return all(source.infos[site.tensors["weight"].name].dtype == torch.bfloat16 for site in source.anatomy.sites())


def apply_plan(
    source: Any, inputs: Tensor, plan: Mapping[str, Any], *, work: Any, progress: Progress = quiet, prefix: str = "apply"
) -> Applied:
    """Changes the model block by block, each block seeing the errors of those before it. inputs (count, ...): calibration rows, used by
    methods that want statistics and by the probe. Finished blocks are read from the journal, never computed again."""
    chosen = chosen_by(source, plan)
    wanted = any(offer.transform.wants for offer in chosen.values())
    probe_rows = probe_of(source, inputs)
    walk_inputs = inputs if wanted else probe_rows
    view = Parts(source, work)
    segments = source.anatomy.segments()
    rest = next(s for s in segments if not s.name)
    layers = [s for s in segments if s.name]
    total = len(segments)
    notes: list[str] = []
    parts: list[str] = []
    tables = [site for site in rest.sites if site.roles.get("part") == "embed"]

    def take_in(key: str, value: Mapping[str, Any]) -> None:
        view.add(key, value)
        parts.append(key)
        notes.extend(value["notes"])

    # tables first: every block then sees their errors
    for site in tables:
        key = f"{prefix}/{site.name}"
        if (value := work.done(key)) is None:
            progress("compressing", 0, total, site.name)
            stats = _table_stats(source, inputs, site, chosen, work)
            weight = source.read(site.tensors["weight"].name)
            value, tensors = _pack(site, chosen.get(site.name), {"weight": weight}, stats)
            work.finish(key, value, tensors)
            del weight, tensors
        take_in(key, value)
    walk = Walk(view, walk_inputs, batch=batch_of(source), narrow=in_bf16(source))
    table = view.packed(tables[0].tensors["weight"].name) if tables else None
    walk.begin(table.rows if table is not None else None)
    del table
    done = {site.name for site in tables}

    def between(after: int) -> None:
        """Sites outside the layers of a traced module that run once `after` stacks were gone through."""
        sites = [s for s in rest.sites if s.context.get("after") == after and s.name in chosen and s.name not in done] if layers else []
        if not sites:
            return
        key = f"{prefix}/:{after}"
        if (value := work.done(key)) is None:
            progress("compressing", after, total, "what stands outside the layers")
            value, tensors = _compress_between(walk, after, sites, chosen, work)
            work.finish(key, value, tensors)
            take_in(key, value)
        else:
            take_in(key, value)
            for site in sites:
                layer, stored = walk.model.get_submodule(site.name), site.tensors["weight"].name
                layer.weight.data.copy_(view.read(stored))  # type: ignore[union-attr, operator]
                fed(layer, view.packed(stored))
        done.update(site.name for site in sites)

    first = {stack[0]: number for number, stack in enumerate(walk.stacks)}
    for number, segment in enumerate(layers):
        if number in first:
            between(first[number])
        key = f"{prefix}/{segment.name}"
        value = work.done(key)
        if value is None:
            progress("compressing", number + 1, total, segment.name)
            module = walk.take(segment)
            value, tensors = _compress_segment(walk, module, segment, chosen, source)
            work.finish(key, value, tensors)
            del tensors
        else:
            view.add(key, value)
            module = walk.take(segment)
            rounded(module, segment.name, _parts(value.get("placed", {})))
        take_in(key, value)
        walk.advance(module, segment)
        release(module)
    between(len(walk.stacks))
    key = f"{prefix}/"
    value = work.done(key)
    if value is None:
        progress("compressing", total, total, "head and norms")
        value, tensors = _compress_rest(walk, rest, layers, chosen, source, done)
        work.finish(key, value, tensors)
        del tensors
    take_in(key, value)
    probe = probed(view, probe_rows)
    view.cached = ("", {})
    # what a routed part holds anew is held as it was until that has learned
    later = sum(entry.get("before", entry["bytes"]) - entry["bytes"] for entry in plan["kept"])
    expected = int(plan["predicted"]["bytes"]) - _beside(plan) + later
    held = sum(entry["bytes"] for entry in (work.done(k) for k in parts))
    if held != expected:
        raise ValueError(f"the result holds {held} bytes where the plan says {expected}")
    return Applied(tuple(parts), dict(view.forms), held, tuple(dict.fromkeys(notes)), probe, view)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pack(
    site: Site, offer: Offer | None, weights: Mapping[str, Tensor], stats: Mapping[Statistic, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One site on its own: journal value and tensors."""
    name = site.tensors["weight"].name
    if offer is None:
        kept = kept_tensor(weights["weight"])
        return {"forms": {}, "kept": [name], "bytes": _size(kept), "notes": []}, {name: kept}
    change = offer.transform(site, weights, {s: stats[s] for s in offer.transform.wants}, offer.level)
    return _packed(offer, change)


def _take_in(value: dict[str, Any], tensors: dict[str, Tensor], one: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
    """Adds one site's journal value and tensors to those of a segment."""
    value["forms"].update(one["forms"])
    if "placed" in one:
        value.setdefault("placed", {}).update(one["placed"])
    value["kept"] += one["kept"]
    value["notes"] += one["notes"]
    value["bytes"] += one["bytes"]
    tensors.update(held)


def _packed(offer: Offer, change: Change) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an offer makes of its site: journal value and tensors, in the bytes that were foreseen."""
    size = _same_bytes(offer, change)
    found, tensors = _formed(change, offer.site)
    return {**found, "kept": [], "bytes": size, "notes": list(change.notes)}, tensors


def _formed(change: Change, site: Site) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A change as its journal value and its tensors."""
    forms, tensors = _stored(change, site)
    placed = {path: part.describe() for path, part in change.place.items() if isinstance(part, Part)}
    return {"forms": forms, **({"placed": placed} if placed else {})}, tensors


def _stored(change: Change, site: Site) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if change.fold or change.cut:
        raise ValueError("this pipeline applies `hold` and `place` only; the change folds or cuts")
    forms, tensors = {}, {}
    for tid, found in change.hold.items():
        packed = Transposed(found) if site.transposed else found
        forms[tid.name] = packed.describe()
        tensors.update({f"{tid.name}.{key}": value for key, value in packed.tensors().items()})
    return forms, tensors


def together(segment: Segment) -> Iterator[tuple[Site, ...]]:
    """Sites that one pass may observe: a stage, with the stages beside it as far as their Gram matrices stay small."""
    sites: list[Site] = []
    size = 0
    for stage in segment.stages:
        own = 4 * stage.sites[0].matrix[1] ** 2
        if sites and not (stage.beside and size + own <= KEPT):
            yield tuple(sites)
            sites, size = [], 0
        sites += stage.sites
        size += own
    if sites:
        yield tuple(sites)


def _compress_segment(
    walk: Walk, module: nn.Module, segment: Segment, chosen: Mapping[str, Offer], source: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All stages of a segment in order: each stage's statistics are taken with the stages before it already changed."""
    value: dict[str, Any] = {"forms": {}, "kept": [], "bytes": 0, "notes": []}
    tensors: dict[str, Tensor] = {}
    for site in (site for site in inside(walk.source, segment) if site.name in chosen):
        _take_out(walk, module, segment, chosen[site.name], source, value)
    for sites in together(segment):
        todo = [chosen[site.name] for site in sites if site.name in chosen]
        # a table that stands inside a layer (T5's relative positions) has no rows of inputs
        seen = [offer for offer in todo if not isinstance(offer.site.kind, Embedding)]
        wants = tuple(dict.fromkeys(s for offer in seen for s in offer.transform.wants))
        stats = walk.observe(module, segment, [offer.site for offer in seen], wants) if wants else {}
        stats |= {o.site.name: _with_gram(o.site, {}, o.transform.wants) for o in todo if o not in seen}
        for offer in todo:
            if offer.transform.wants and "expert" in offer.site.context and not stats.get(offer.site.name):
                value["notes"].append(f"{offer.site.name}: no token of the calibration data reached this expert, it has no statistics")
            target = walk.site_module(module, segment, offer.site)
            weight = oriented(offer.site, target.weight.detach())  # type: ignore[union-attr, arg-type, operator]
            with suited(weight.numel()):
                change = offer.transform(offer.site, {"weight": weight}, observed(stats, offer.site, offer.transform.wants), offer.level)
            found, held = _packed(offer, change)
            _take_in(value, tensors, found, held)
            form = change.hold[offer.site.tensors["weight"]]
            target.weight.data.copy_(oriented(offer.site, form.dense().reshape(weight.shape)))  # type: ignore[union-attr, operator]
            fed(target, form)
            if rounded(module, segment.name, _parts(found.get("placed", {}))):
                # what was kept of this stage's inputs does not know of it
                walk.forget()
    _keep(value, tensors, source, [name for name in segment.tensors if name not in value["forms"]])
    # later blocks see what is stored of norms and biases too, as they do in a run that goes on from the journal
    for path, own in (*module.named_parameters(), *module.named_buffers()):
        name = f"{segment.name}.{path}" if segment.name else path
        if (stored := source.tied.get(name, name)) in value["kept"] and not torch.equal(own.data, tensors[stored].to(own.dtype)):
            own.data.copy_(tensors[stored])
            walk.forget()
    return value, tensors


def _take_out(walk: Walk, module: nn.Module, segment: Segment, offer: Offer, source: Any, value: dict[str, Any]) -> None:
    """A sub-layer that goes: its weights in the walk are what its forms say, zeros."""
    own = {name: module.get_parameter(path) for name, path in stored_paths(source, module, segment.name).items()}
    weights = {role: own[tensor.name].data for role, tensor in offer.site.tensors.items()}
    change = offer.transform(offer.site, weights, {}, offer.level)
    # what is absent has no tensors
    _take_in(value, {}, *_packed(offer, change))
    for tensor, form in change.hold.items():
        own[tensor.name].data.copy_(form.dense())
    walk.forget()


def _compress_between(
    walk: Walk, after: int, sites: Sequence[Site], chosen: Mapping[str, Offer], work: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sites outside the layers, one after another, each in the walk's own model too, so that what follows sees its error."""
    value: dict[str, Any] = {"forms": {}, "kept": [], "bytes": 0, "notes": []}
    tensors: dict[str, Tensor] = {}
    for site in sites:
        offer = chosen[site.name]
        if isinstance(site.kind, Embedding):
            priced = _load_stats(work) if work.done("stats") is not None else {}
            stats = _with_gram(site, priced.get(site.name, {}), offer.transform.wants)
        else:
            stats = walk.observe_rest(after, [site], offer.transform.wants)[site.name] if offer.transform.wants else {}
        target: Tensor = walk.model.get_submodule(site.name).weight.data  # type: ignore[union-attr, assignment]
        one, held = _pack(site, offer, {"weight": oriented(site, target)}, stats)
        form = restore(one["forms"][site.tensors["weight"].name], below(held, site.tensors["weight"].name))
        target.copy_(form.dense().reshape(target.shape))
        fed(walk.model.get_submodule(site.name), form)
        _take_in(value, tensors, one, held)
    return value, tensors


def _compress_rest(
    walk: Walk, rest: Segment, layers: Sequence[Segment], chosen: Mapping[str, Offer], source: Any, done: set[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands outside the layers (head, last norm), or the whole of a model without layers."""
    if not layers:
        return _compress_segment(walk, walk.take(rest), rest, chosen, source)
    value: dict[str, Any] = {"forms": {}, "kept": [], "bytes": 0, "notes": []}
    tensors: dict[str, Tensor] = {}
    settled = {site.tensors["weight"].name for site in rest.sites if site.name in done}
    for site in rest.sites:
        if site.name in done:
            continue
        offer = chosen.get(site.name)
        stats = walk.observe_tail(site, offer.transform.wants) if offer is not None and offer.transform.wants else {}
        one, held = _pack(site, offer, {"weight": source.read(site.tensors["weight"].name)}, stats)
        settled.add(site.tensors["weight"].name)
        _take_in(value, tensors, one, held)
    _keep(value, tensors, source, [name for name in rest.tensors if name not in settled])
    return value, tensors


def _keep(value: dict[str, Any], tensors: dict[str, Tensor], source: Any, names: Sequence[str]) -> None:
    """Stored tensors that no method touched join a segment's result."""
    for name in names:
        if name in source.infos:
            kept = kept_tensor(source.read(name))
            tensors[name] = kept
            value["kept"].append(name)
            value["bytes"] += _size(kept)


def _table_stats(source: Any, inputs: Tensor, site: Site, chosen: Mapping[str, Offer], work: Any) -> dict[Statistic, Tensor]:
    """Statistics of a table before anything is changed: from pricing where that happened, else from one walk of the original. A tied
    table is seen as the head (the last hidden states are its input), an untied one by how often each row is read."""
    offer = chosen.get(site.name)
    if offer is None or not offer.transform.wants:
        return {}
    if work.done("stats") is None:
        walk = Walk(source, inputs, batch=batch_of(source))
        walk.begin()
        for segment in walk.layers:
            module = walk.take(segment)
            walk.advance(module, segment)
            release(module)
        stats = walk.observe_tail(site, (Gram(),)) if site.roles.get("tied") else {}
        work.finish("stats", {"sites": [site.name]}, {f"{site.name}|{type(k).__name__}": v for k, v in stats.items()})
    return _with_gram(site, _load_stats(work).get(site.name, {}), offer.transform.wants)


# ---- tune

# a lesson over the whole model is left out where the model has more parameters than this: it needs some 24 bytes for each
TUNABLE = 200_000_000
# of a lesson over the whole model, at once: its loss and gradient take some six times as much
LOGITS = 64 * 1024**2
# of a lesson over the whole model, at once: gradients, a set for each thread
GRADIENTS = 256 * 1024**2
# of a lesson over the whole model, in all: predictions to meet, on disk
TARGETS = 2 * 1024**3


def filed(shelf: Shelf, logits: Iterator[Tensor], after: int = 0) -> Shelved:
    """The original's predictions for each batch, in half precision, in memory up to a limit and on disk beyond it. after: so many batches
    are there already."""
    count = after
    for batch in logits:
        shelf.put(str(count), batch.half())
        count += 1
    return Shelved(shelf, count)


def tune_plan(
    source: Any, inputs: Tensor, applied: Applied, lesson: Lesson, *, seed: int, work: Any, progress: Progress = quiet, teacher: Any = None
) -> Applied:
    """The applied model with what can be learned in it tuned on calibration rows (count, ...): the whole together, against the outputs of
    the teacher (the model itself unless another is given), or part by part, against the model's own, as the lesson's scope says. Bytes and
    forms stay; each finished part is written anew under its own key. A cut run goes on with the part that it was at."""
    keys = [f"tuned/{part}" for part in applied.parts]
    if not all(work.done(key) for key in keys):
        if isinstance(lesson.scope, Model):
            forms, said = learn_whole(source, inputs, applied, lesson, seed=seed, work=work, progress=progress, teacher=teacher or source)
            learned: Forms = forms.get
        else:
            learned, said = _by_parts(source, inputs, applied, lesson, seed, work, progress)
        for key, part in zip(keys, applied.parts, strict=True):
            value = dict(work.done(part))
            tensors = dict(work.tensors(part))
            for name in value["forms"]:
                if (form := learned(name)) is not None:
                    tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in form.tensors().items()})
            for name in value["kept"]:
                if (form := learned(name)) is not None:
                    tensors[name] = kept_tensor(form.dense())
            if work.done(key) is None:
                work.finish(key, value | {"notes": [*value["notes"], said]}, tensors)
    return reviewed(source, keys, inputs, work)


def reviewed(source: Any, keys: Sequence[str], inputs: Tensor, work: Any) -> Applied:
    """A model whose finished parts have these keys."""
    view = Parts(source, work)
    for key in keys:
        view.add(key, work.done(key))
    notes = tuple(dict.fromkeys(note for key in keys for note in work.done(key)["notes"]))
    probe = probed(view, probe_of(source, inputs))
    view.cached = ("", {})
    return Applied(tuple(keys), dict(view.forms), sum(work.done(key)["bytes"] for key in keys), notes, probe, view)


# gives a form by its stored name after learning, None where nothing was learned of it
Forms = Callable[[str], Packed | None]


def hardened(soft: Soft) -> Packed:
    """The stored form of what has been learned."""
    return soft.harden()


def learn_whole(
    source: Any,
    inputs: Tensor,
    applied: Applied,
    lesson: Lesson,
    *,
    seed: int,
    work: Any,
    progress: Progress,
    teacher: Any,
    end: Callable[[Soft], Packed] = hardened,
) -> tuple[dict[str, Packed], str]:
    """All that can be learned, together, against the teacher's outputs, by stored name, and a sentence on it. end: what becomes of each
    form that has learned."""
    # images are small: a step sees as many as a batch of the walk
    batch = lesson.batch if source.task == "text" else max(lesson.batch, batch_of(source))
    inputs = here(inputs)
    rows = at_once(source, inputs, batch)
    lanes = abreast(source, rows)
    rows //= lanes
    progress("tuning", 0, lesson.steps, "the original's predictions")
    batches = inputs.split(rows)
    shelf = Shelf(work.folder / "tuning", 256 * 1024**2)
    targets = filed(shelf, finished_logits(teacher, inputs, rows, narrow=lesson.narrow))
    if source.task == "text":
        # predictions are kept in half precision
        room = max(0, TARGETS // (2 * inputs[0].numel() * int(getattr(source.config, "vocab_size", 1))) - len(inputs))
        more = lesson.varied(inputs, lambda: map(targets.__getitem__, range(len(targets))), room, torch.Generator().manual_seed(seed))
        if len(more):
            targets = filed(shelf, finished_logits(teacher, more, rows, narrow=lesson.narrow), len(targets))
            batches = (*batches, *more.split(rows))
    model = applied.view.skeleton()
    applied.view.fill(model, "", torch.float32)
    held = {name: packed for name in applied.forms if (packed := applied.view.packed(name)) is not None}
    if lesson.entire:
        held |= {name: Dense(kept_tensor(applied.view.read(name))) for name in stored_paths(source, model) if name not in held}
    forms, losses = learn(
        source, model, held, batches, targets, lesson, seed=seed, together=batch // rows, lanes=lanes, progress=progress, end=end
    )  # fmt: skip
    shelf.clear()
    return forms, f"tuned over {lesson.steps} steps: {lesson.objective.name} {_first_and_last(losses)}"


def at_once(source: Any, inputs: Tensor, batch: int) -> int:
    """How many rows of a step of `batch` are in memory together, a divisor of it: as many as keep their logits within LOGITS bytes."""
    wide = 4 * inputs[0].numel() * getattr(source.config, "vocab_size", 1) if source.task == "text" else 0
    return max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * wide <= LOGITS))


def abreast(source: Any, rows: int) -> int:
    """By how many threads the rows that are in memory together are shared, a divisor of them: no more than there are cores, and only
    where the gradients that each thread makes of all weights are small."""
    if source.task != "text" or device() != CPU:
        return 1
    most = min(torch.get_num_threads(), GRADIENTS // (4 * max(source.parameters, 1)))
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n <= most))


def _by_parts(source: Any, inputs: Tensor, applied: Applied, lesson: Lesson, seed: int, work: Any, progress: Progress) -> tuple[Forms, str]:
    """All that can be learned, part by part, and a sentence on it."""
    view = Parts(source, work)
    for part in applied.parts:
        view.add(part, work.done(part))
    said = Reconstruction(source, view, inputs, lesson, seed, work, progress)()
    return view.packed, said


def learn(
    source: Any,
    model: nn.Module,
    held: Mapping[str, Packed],
    batches: Sequence[Tensor],
    targets: Targets,
    lesson: Lesson,
    *,
    seed: int,
    together: int = 1,
    lanes: int = 1,
    progress: Progress = quiet,
    end: Callable[[Soft], Packed] = hardened,
) -> tuple[dict[str, Packed], list[float]]:
    """What can be learned of the forms, by stored name, learned together; and the objective of each step. model: filled with the weights
    that stay; targets: the outputs that each of the batches must meet; together: batches that make a step; lanes: those of them that run at
    once; end: what becomes of each form that has learned. Where a lesson asks for the first slices of what is joined, a narrower module
    around the same tensors computes with them."""
    path = stored_paths(source, model)
    softs: dict[str, Soft] = {}
    for name, packed in held.items():
        soft = lesson.soften(packed, source.read(name).float().reshape(packed.shape))
        if soft is not None:
            softs[name] = soft

    # a call puts weights into a module while it runs, so that each thread needs its own
    twins: dict[tuple[int, tuple[tuple[int, ...], ...]], nn.Module] = {}

    def run(i: int, weights: Mapping[str, Tensor]) -> Tensor:
        own = {path[name]: weight for name, weight in weights.items()}
        key = (threading.get_ident(), tuple(tuple(weight.shape) for weight in own.values()))
        if key not in twins:
            smaller = {at: weight.detach() for at, weight in own.items() if weight.shape != model.get_parameter(at).shape}
            twins[key] = narrowed(model, smaller) if smaller or lanes > 1 else model
        with narrowly(lesson.narrow):
            return answer_of(torch.func.functional_call(twins[key], own, (batches[i],)))

    losses = tune(
        run, targets, softs, lesson,
        generator=torch.Generator().manual_seed(seed), together=together, lanes=lanes,
        progress=lambda done, total: progress("tuning", done, total, "all layers together"),
    )  # fmt: skip
    return {name: end(soft) for name, soft in softs.items()}, losses


# ---- place


def beside(source: Any, recipe: Recipe) -> dict[str, int]:
    """Bytes of what a recipe's router, or its decoder, adds to the model, by path."""
    if recipe.route is not None:
        if source.parameters > TUNABLE:
            raise UserError(
                f"recipe {recipe.name} holds the whole model while it learns and is for {TUNABLE:,} weights at most, "
                f"{source.spec} has {source.parameters:,}; take a smaller model, or another recipe"
            )
        return {path: _own_bytes(part) for path, part in _placed(source, recipe).items()}
    if recipe.decode is None:
        return {}
    if getattr(source, "config", None) is None:
        raise UserError(f"recipe {recipe.name} places a decoder's parts, which needs a language model that was opened from a folder")
    placed = build(recipe.decode).place(body_of(source.config), None).place
    return {path: _own_bytes(part) for path, part in placed.items()}


def _placed(source: Any, recipe: Recipe) -> dict[str, Routed]:
    """A recipe's routed parts, nothing of them filled."""
    return {} if recipe.route is None else parts_of(source, build(recipe.route), source.skeleton())[0]


def _own_bytes(part: nn.Module) -> int:
    return part.settled()[""] if isinstance(part, Settling) else sum(2 * p.numel() for p in part.parameters())


def held_anew(source: Any, recipe: Recipe) -> dict[str, int]:
    """Bytes of the model's own tensors that a recipe's routed parts hold in another form, by stored name."""
    found = {}
    for path, part in _placed(source, recipe).items():
        for name, size in part.settled().items() if isinstance(part, Settling) else ():
            if name:
                found[source.tied.get(f"{path}.{name}", f"{path}.{name}")] = size
    return found


def route_plan(
    source: Any, inputs: Tensor, applied: Applied, router: Router, *, seed: int, work: Any, progress: Progress = quiet
) -> Applied:
    """The applied model with routed parts in it, learned on calibration rows (count, ...) against the original's predictions: each part
    of it is written anew under its own key, what a router holds with the segment that it stands in. A cut run learns again."""
    keys = [f"routed/{part}" for part in applied.parts]
    if not all(work.done(key) for key in keys):
        folder = work.folder / "routing"
        model, parts, said = learn_routed(source, applied.view, inputs, router, seed=seed, folder=folder, progress=progress)
        forms = {
            source.tied.get(f"{path}.{name}", f"{path}.{name}"): form
            for path, part in parts.items()
            for name, form in (part.settle() if isinstance(part, Settling) else {}).items()
        }
        stored = {
            source.tied.get(name, name): kept_tensor(value)
            for name, value in model.state_dict().items()
            # what holds its form stands in the model already
            if name.rpartition(".")[0] not in forms
        }
        described = {path: part.describe() for path, part in parts.items()}
        # what comes next opens the model anew
        del model, parts
        fresh = sorted(stored.keys() - {name for part in applied.parts for name in work.done(part)["kept"]})
        homes = {key: part.partition("/")[2] for key, part in zip(keys, applied.parts, strict=True)}
        for key, part in zip(keys, applied.parts, strict=True):
            mine = [name for name in fresh if _home(name, homes) == key]
            value, had = dict(work.done(part)), work.tensors(part)
            anew = {name: form for name, form in forms.items() if name in had}
            tensors = {name: stored.get(name, tensor) for name, tensor in had.items() if name not in anew}
            tensors |= {name: stored[name] for name in mine}
            tensors |= {f"{name}.{leaf}": tensor for name, form in anew.items() for leaf, tensor in form.tensors().items()}
            value |= {
                "kept": [*(name for name in value["kept"] if name not in anew), *mine],
                "forms": {**value["forms"], **{name: form.describe() for name, form in anew.items()}},
                "bytes": value["bytes"]
                + sum(_size(stored[name]) for name in mine)
                + sum(form.nbytes - _size(had[name]) for name, form in anew.items()),
                "placed": {path: words for path, words in described.items() if _home(f"{path}.", homes) == key},
                "notes": [*value["notes"], said],
            }
            if work.done(key) is None:
                work.finish(key, value, tensors)
    return reviewed(source, keys, inputs, work)


def _home(name: str, homes: Mapping[str, str]) -> str:
    """Of parts by key -> the segment's path ("" where it is none): the one that a tensor lies in."""
    inside = [key for key, path in homes.items() if path and name.startswith(f"{path}.")]
    return (inside or [key for key, path in homes.items() if not path])[0]


def learn_routed(
    source: Any, opened: Any, inputs: Tensor, router: Router, *, seed: int, folder: Path, progress: Progress = quiet
) -> tuple[nn.Module, dict[str, Routed], str]:
    """The opened model in memory with routed parts that have learned, and a sentence on it. The whole learns together, against the
    predictions of the source; where nothing is learned by steps, parts look at the inputs."""
    lesson, inputs = router.lesson, here(inputs)
    if lesson is None:
        model = opened.skeleton()
        opened.fill(model, "", torch.float32)
        parts, notes = parts_of(source, router, model, inputs[:2])
        install(model, parts)
        begin(parts, seed)
        model.eval().requires_grad_(False)
        look(model, parts, inputs.split(batch_of(source)), lambda done, total: progress("tuning", done, total, "the calibration data"))
        return model, parts, "; ".join([f"routed by what {len(inputs)} calibration rows show", *notes])
    batches = inputs.split(lesson.batch)
    # a batch of one row says nothing of a norm's statistics
    batches = batches[:-1] if len(batches) > 1 and len(batches[-1]) < lesson.batch else batches
    progress("tuning", 0, lesson.steps, "the original's predictions")
    rows = inputs[: sum(len(batch) for batch in batches)]
    targets = filed(Shelf(folder, 256 * 1024**2), finished_logits(source, rows, lesson.batch))
    model = opened.skeleton()
    opened.fill(model, "", torch.float32)
    parts, notes = parts_of(source, router, model, inputs[:2])
    install(model, parts)
    begin(parts, seed)
    learns: dict[str, nn.Module] = {"": model} if router.learns == "model" else dict(parts)
    rates = {name for name, _ in lesson.rates}
    for module in learns.values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in rates)
    for part in parts.values():
        part.run = "learning"
        part.remember()
    model.train(router.learns == "model")
    run = outputs(model)
    losses = tune(
        lambda i, _: run(batches[i]), targets, learns, lesson, generator=torch.Generator().manual_seed(seed),
        progress=lambda done, total: progress("tuning", done, total, "routers, and what they route"),
    )  # fmt: skip
    targets.shelf.clear()
    model.eval().requires_grad_(False)
    for part in parts.values():
        part.run, part.error = "gathered", None
    said = f"routed, learned over {lesson.steps} steps: {lesson.objective.name} {_first_and_last(losses)}"
    return model, parts, "; ".join([said, *notes])


def place_parts(
    source: Any, inputs: Tensor, applied: Applied, decoder: Decoder, *, seed: int, work: Any, progress: Progress = quiet
) -> dict[str, Tensor]:
    """What a decoder needs beside the applied model, learned on calibration rows: tensors by dotted name, as they are stored. A cut run
    learns again from the start."""
    key = "placed"
    if work.done(key) is None:
        parts, losses = learn_parts(source, applied.view, inputs, decoder, seed=seed, folder=work.folder / "placing", progress=progress)
        applied.view.cached = ("", {})
        said = [f"parts for decoding learned over {len(losses)} steps: {_first_and_last(losses)}"] if losses else []
        tensors = {f"{path}.{name}": kept_tensor(t.detach()) for path, part in parts.items() for name, t in part.state_dict().items()}
        work.finish(key, {"notes": said}, tensors)
    return dict(sorted(work.tensors(key).items()))


def learn_parts(
    source: Any, opened: Any, inputs: Tensor, decoder: Decoder, *, seed: int, folder: Path, progress: Progress = quiet
) -> tuple[dict[str, nn.Module], list[float]]:
    """A decoder's parts, and the objective of each step of their lesson, from hidden states and predictions of the opened model itself
    (`source`, or a view of it that is compressed) over rows of tokens. Never more than one segment of the model in memory."""
    generator = torch.Generator().manual_seed(seed)
    parts = dict(decoder.place(body_of(source.config), generator).place)
    if (lesson := decoder.lesson) is None:
        return parts, []
    progress("tuning", 0, lesson.steps, "what the model says of the calibration rows")
    hidden = Shelf(folder / "hidden", KEPT)
    walk = Walk(opened, inputs, batch=lesson.batch)
    walk.begin()
    for number, segment in enumerate(walk.layers):
        module = walk.take(segment)
        if number == decoder.tap:
            for i, batch in enumerate(walk.hidden):
                hidden.put(str(i), batch)
        walk.advance(module, segment)
        release(module)
    targets = filed(Shelf(folder / "targets", KEPT), walk.logits())
    stored = f"{walk.head_name()}.weight"
    head = opened.read(source.tied.get(stored, stored)).float()
    for part in parts.values():
        part.train().requires_grad_(True)
    losses = tune(
        lambda i, _: decoder.taught(parts, hidden.get(str(i)), lambda x: nn.functional.linear(x, head)),
        targets, parts, lesson, generator=generator,
        progress=lambda done, total: progress("tuning", done, total, "parts beside the model"),
    )  # fmt: skip
    hidden.clear()
    targets.shelf.clear()
    for part in parts.values():
        part.eval().requires_grad_(False)
    return parts, losses


def _first_and_last(losses: Sequence[float]) -> str:
    """The objective at both ends, each the mean of a tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return f"on calibration rows {sum(losses[:tenth]) / tenth:.4g} -> {sum(losses[-tenth:]) / tenth:.4g}"


def finished_logits(opened: Any, inputs: Tensor, batch: int, *, narrow: bool = False) -> Iterator[Tensor]:
    """Logits of a model over inputs, batch by batch, one segment in memory at a time. narrow: as of a Walk."""
    walk = Walk(opened, inputs, batch=batch, narrow=narrow)
    walk.begin()
    for segment in walk.layers:
        module = walk.take(segment)
        walk.advance(module, segment)
        release(module)
    if walk.whole:
        module = walk.take(walk.rest)
        yield from walk.outputs(module, walk.rest)
        return
    yield from walk.logits()


def probed(view: Parts, rows: Tensor) -> Tensor:
    """The logits that the written result is compared with. Where inputs are rounded they are computed just as that one will: a sum in
    another order may fall on the other side of a step, and what follows from that is no longer small."""
    view.as_written = any(_feeds(form) for form in view.forms.values())
    try:
        return next(finished_logits(view, rows, 1))
    finally:
        view.as_written = False


def _feeds(described: Any) -> bool:
    """Whether a stored form, or one within it, does something to its inputs."""
    if isinstance(described, Mapping):
        name = str(described.get("form", "core."))
        own = not name.startswith("core.") and stored_class(name).feed is not Packed.feed
        return own or any(_feeds(inner) for inner in described.values())
    return isinstance(described, list) and any(_feeds(inner) for inner in described)


def probe_of(source: Any, inputs: Tensor) -> Tensor:
    """What the written result is compared on: one sample, of text its first 64 tokens, since logits of a large vocabulary are kept."""
    return inputs[:1, :64] if source.task == "text" else inputs[:1]


def reload_difference(written: Any, applied: Applied, inputs: Tensor) -> float:
    """Norm of the difference over the norm, between the logits of what was searched and of what was written and read back."""
    again = next(finished_logits(written, inputs, 1))
    return float((again - applied.probe).norm() / applied.probe.norm().clamp(min=1e-12))
