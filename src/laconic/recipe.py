"""A recipe is a list of (method, where, levels) and a search over their price list, in YAML or Python; unknown keys are refused.

A method is written as its path, with knobs in brackets: `quantize.residual.lorc(first=quantize.round.gptq(clip=True))`."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from laconic.core.decoder import Decoder
from laconic.core.errors import UserError, nearest
from laconic.core.menu import Order, Search
from laconic.core.router import Router
from laconic.core.score import Score
from laconic.core.site import Conv, Embedding, Linear, Site, Sublayer, TensorId
from laconic.core.state import Pattern, Schedule, State
from laconic.core.transform import Align, Cut, Layer, Lesson, Model, Scope, Transform, Window

HOME = Path(__file__).parent
# the search that takes one level for all
UNIFORM = "search.allocate.uniform"
KINDS = {"linear": Linear, "conv": Conv, "embedding": Embedding, "sublayer": Sublayer}
# a matrix that any method can be asked about before a model is opened
PROBE = Site("probe", Linear(), {"weight": TensorId("probe.weight")}, (64, 64))
ROLES = (Transform, Score, Search, Lesson, Cut, Align, Order, State, Pattern, Schedule, Decoder, Router)
# what a recipe may do to a model, stage by stage
STAGES = ("cut", "align", "nest", "choices", "tune", "restore", "order", "decode", "route")
# what a lesson's scope may be called
SCOPES: dict[str, type[Scope]] = {"layer": Layer, "block": Window, "window": Window, "model": Model}


class Choice(BaseModel):
    """One method, where it may act and at which levels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    levels: tuple[dict[str, Any], ...] = Field(min_length=1)
    where: str = ".*"
    kinds: tuple[Literal["linear", "conv", "embedding", "sublayer"], ...] = ("linear", "conv", "embedding")

    def offers(self, site: Site) -> bool:
        """Whether the method may act at a site."""
        return isinstance(site.kind, tuple(KINDS[k] for k in self.kinds)) and re.fullmatch(self.where, site.name) is not None


class Cutting(BaseModel):
    """Coupled channels that are removed before anything else. where: regex of the first matrix that writes a group's channels. keep: share
    of the model's bytes that the cut leaves for `choices` to hold in fewer; without it the cut alone meets the budget. inputs: what
    statistics are taken from, the calibration data or noise of its shape. norms: move running statistics with what reaches them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    where: str = ".*"
    keep: float | None = Field(default=None, gt=0, le=1)
    inputs: Literal["data", "noise"] = "data"
    norms: bool = True

    def covers(self, name: str) -> bool:
        """Whether a group may be cut, by its name."""
        return re.fullmatch(self.where, name) is not None


class Aligning(BaseModel):
    """Edits that leave what the model computes as it is, before anything is priced. where: regex of the edges that may be acted on. needed:
    whether a model without such an edge is refused; else that is noted."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    where: str = ".*"
    needed: bool = True

    def covers(self, name: str) -> bool:
        """Whether an edge may be acted on, by its name."""
        return re.fullmatch(self.where, name) is not None


class Nesting(BaseModel):
    """Coupled channels that are put in order of what they are worth, the best first, and held in slices, so that the first ones alone are
    a narrower model. where: regex of the first matrix that writes a group's channels. widths: the share of channels that each size has."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    where: str = ".*"
    widths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    @field_validator("widths")
    @classmethod
    def _rising(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1:
            raise ValueError("widths are shares of the channels that rise from above 0 to 1, two or more")
        return widths

    def covers(self, name: str) -> bool:
        """Whether a group is nested, by its name."""
        return re.fullmatch(self.where, name) is not None


class Vectors(BaseModel):
    """What is learned of a file of vectors. sizes: how many numbers each nested embedding has; none: halves of the whole down to 8. k: of
    how many nearest neighbours recall is the share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lesson: str
    sizes: tuple[int, ...] = ()
    k: int = Field(default=10, ge=1)


class Recipe(BaseModel):
    """cut: what is removed first; with `nest` only where the model is over the budget. align: how the model is rewritten first so that it
    is easier to round. search: how rows are bought. keep: regex of sites that stay as they are. price_rows: rows of the calibration text
    used for pricing. judge: measure the solved plan against the best uniform one at the output and take the better. tune: what is learned
    afterwards, over the whole model or part by part, kept where it is better at the output. restore: a lesson over the whole model that
    moves the weights before anything else, so that what follows holds them better. order: how the parts of what is held follow
    one another in a result that loads at any size up to its own, found on `order_rows` rows of the search data. nest: channels held in
    nested slices, which `tune` then learns together and `order` puts in sequence. decode: how the result is decoded; what that needs
    beside the model is learned last and counted in the budget. Without choices and cut all weights stay, and no budget is needed.
    route: what runs for which input, learned on calibration data; so far alone in a recipe. vectors: for a file of vectors in place of a
    model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    says: str = ""
    search: str = "search.allocate.knapsack"
    cut: Cutting | None = None
    align: Aligning | None = None
    nest: Nesting | None = None
    vectors: Vectors | None = None
    choices: tuple[Choice, ...] = ()
    keep: str = "(?!)"
    price_rows: int = Field(default=32, ge=1)
    judge: bool = True
    tune: str | None = None
    restore: str | None = None
    order: str | None = None
    order_rows: int = Field(default=2, ge=1)
    decode: str | None = None
    route: str | None = None

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in: what is stored in the output."""
        found = self.model_dump(mode="json")
        for stage in ("cut", "align", "nest", "restore", "route", "vectors"):
            if found[stage] is None:
                # recipes without a stage are written and hashed as before there was one
                del found[stage]
        return found

    @property
    def chooses(self) -> bool:
        """Whether there is something to choose within a budget: levels of one kind of choice, or methods to solve over. A recipe that names
        one level for whatever it acts on is followed as it stands, and a budget given beside it is only checked."""
        return bool(self.choices) and not (self.search == UNIFORM and all(len(choice.levels) == 1 for choice in self.choices))

    def hash(self) -> str:
        """sha256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def named() -> dict[str, Path]:
    """The recipes that come with laconic."""
    return {path.stem: path for path in sorted((HOME / "recipes").glob("*.yaml"))}


def load_recipe(name: str) -> Recipe:
    """A named recipe or a YAML file. One that comes with laconic is read once."""
    known = named()
    # schemes are written W4A16 as often as w4a16
    name = name.lower() if name.lower() in known else name
    path = known.get(name, Path(name))
    if name not in known and not path.is_file():
        if path.suffix in (".yaml", ".yml") or "/" in name:
            raise UserError(f"recipe file {name} does not exist; named recipes are {', '.join(known)}")
        raise UserError(f"unknown recipe {name!r}{nearest(name, known)}")
    return _shipped(path) if name in known else _read(name, path)


@cache
def _shipped(path: Path) -> Recipe:
    return _read(path.stem, path)


def _read(name: str, path: Path) -> Recipe:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name} is not readable YAML ({str(error).splitlines()[0]}); mend the file") from None
    if not isinstance(content, Mapping):
        raise UserError(f"recipe {name} holds no keys; it needs at least `name` and `choices`")
    try:
        recipe = Recipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise UserError(f"recipe {name}: {_first(error)}") from None
    check(recipe)
    return recipe


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        known = Choice.model_fields if "choices" in found["loc"] else Recipe.model_fields
        return f"unknown key {place!r}{nearest(str(found['loc'][-1]), known)}"
    return f"{place}: {found['msg'].lower()}"


def _said(recipe: Recipe, *but: str) -> list[str]:
    """The stages that a recipe says something of, `but` left out."""
    return [stage for stage in STAGES if stage not in but and getattr(recipe, stage)]


def _named(stages: Sequence[str]) -> str:
    return ", ".join(f"`{stage}`" for stage in stages)


def check(recipe: Recipe) -> None:
    """Builds every method and level once, so that a mistake is found before work starts."""
    if recipe.vectors is not None:
        if not isinstance(build(recipe.vectors.lesson), Lesson):
            raise UserError(f"recipe {recipe.name}: {recipe.vectors.lesson} is no lesson; try nest.vector.mrl")
        if _said(recipe):
            raise UserError(f"recipe {recipe.name} is for vectors (`vectors`) and says something of models beside; keep one")
        return
    if not _said(recipe, "tune", "restore", "order"):
        raise UserError(f"recipe {recipe.name} changes nothing; give it `choices`, a `cut`, `nest`, `decode` or `route`")
    if recipe.route is not None:
        if not isinstance(build(recipe.route), Router):
            raise UserError(f"recipe {recipe.name}: {recipe.route} is no router; try route.gate.factorllm")
        if others := _said(recipe, "route"):
            raise UserError(f"recipe {recipe.name}: `route` beside {_named(others)} is not there yet; leave one out")
    if recipe.cut is not None:
        if not isinstance(build(recipe.cut.method), Cut):
            raise UserError(f"recipe {recipe.name}: {recipe.cut.method} cuts no channels; try prune.cut.obspa")
        _regex(recipe.cut.where, recipe)
    if recipe.align is not None:
        if not isinstance(build(recipe.align.method), Align):
            raise UserError(
                f"recipe {recipe.name}: {recipe.align.method} rewrites no model along its edges; try quantize.rotate.mambaquant"
            )
        if recipe.cut is not None:
            raise UserError(
                f"recipe {recipe.name} has a `cut` and an `align`, which do not go together yet; cut first, then align the result"
            )
        if not recipe.choices:
            raise UserError(f"recipe {recipe.name} only aligns, which changes nothing by itself; give it `choices`")
        _regex(recipe.align.where, recipe)
    for choice in recipe.choices:
        transform = build(choice.method)
        if not isinstance(transform, Transform):
            raise UserError(
                f"recipe {recipe.name}: {choice.method} is no transform; choices change weights, scores and searches go inside them"
            )
        for level in choice.levels:
            try:
                transform.stored(PROBE, level_of(transform, level))
            except ValueError as error:
                raise UserError(f"recipe {recipe.name}: {choice.method} at {dict(level)}: {error}") from None
        _regex(choice.where, recipe)
    if recipe.nest is not None:
        _check_nest(recipe, recipe.nest)
    if recipe.tune is not None and not isinstance(build(recipe.tune), Lesson):
        raise UserError(f"recipe {recipe.name}: {recipe.tune} is no lesson; try quantize.train.straight")
    if recipe.restore is not None:
        _check_restore(recipe, recipe.restore)
    if recipe.order is not None and not isinstance(build(recipe.order), Order):
        raise UserError(f"recipe {recipe.name}: {recipe.order} is no order; try nest.order.rounds")
    if recipe.decode is not None and not isinstance(build(recipe.decode), Decoder):
        raise UserError(f"recipe {recipe.name}: {recipe.decode} is no decoder; try decode.draft.kangaroo")
    if not isinstance(build(recipe.search), Search):
        raise UserError(f"recipe {recipe.name}: {recipe.search} is no search; try search.allocate.knapsack")


def _check_restore(recipe: Recipe, restore: str) -> None:
    lesson = build(restore)
    if not isinstance(lesson, Lesson) or not isinstance(lesson.scope, Model):
        raise UserError(f"recipe {recipe.name}: {restore} is no lesson over the whole model; try quantize.restore.restorative")
    others = _said(recipe, "choices", "tune", "restore")
    if others or not recipe.choices:
        beside = f"beside {_named(others)}" if others else "without `choices`"
        raise UserError(f"recipe {recipe.name}: `restore` {beside} is not there yet; leave it out")


def _check_nest(recipe: Recipe, nest: Nesting) -> None:
    if not isinstance(build(nest.method), Cut):
        raise UserError(f"recipe {recipe.name}: {nest.method} weighs no channels; try prune.cut.obspa")
    _regex(nest.where, recipe)
    if recipe.choices or recipe.decode is not None or recipe.align is not None:
        raise UserError(f"recipe {recipe.name} has `nest` beside `choices`, `align` or `decode`: not yet; nest alone, or leave it out")
    if recipe.order is None:
        raise UserError(f"recipe {recipe.name} nests channels and says no `order` for their slices; give it nest.order.mixnmatch")
    if recipe.tune is not None and not isinstance(getattr(build(recipe.tune), "scope", None), Model):
        raise UserError(
            f"recipe {recipe.name}: {recipe.tune} learns part by part, and nested channels learn together; try nest.width.matformer"
        )


def _regex(text: str, recipe: Recipe) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"recipe {recipe.name}: where={text!r} is no regular expression ({error})") from None


def paths() -> list[str]:
    """Names of all methods, from the files."""
    root = HOME / "methods"
    return sorted(".".join(p.relative_to(root).with_suffix("").parts) for p in root.glob("*/*/*.py") if p.stem != "__init__")


@cache
def method_class(path: str) -> type:
    """The one public class of a role in the file of that path."""
    if path not in (known := paths()):
        raise UserError(f"unknown method {path!r}{nearest(path, known)}")
    module = importlib.import_module(f"laconic.methods.{path}")
    found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__ and issubclass(c, ROLES)]
    if len(found) != 1:
        raise UserError(f"{path} is not a method that a recipe can name: its file holds {len(found)} of the roles that recipes use")
    return found[0]


def build(text: str) -> Any:
    """A method from its written form; knobs are literals or methods."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise UserError(f"method {text!r} is not understood; write a path such as quantize.round.gptq, knobs in brackets") from None
    return _build(tree, text)


def _path(node: ast.expr) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _class(path: str) -> type:
    return SCOPES[path] if path in SCOPES else method_class(path)


def _build(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and (path := _path(node.func)) and not node.args:
        cls = _class(path)
        fields = [f.name for f in dataclasses.fields(cls) if f.init]
        knobs = {}
        for keyword in node.keywords:
            if keyword.arg not in fields:
                raise UserError(f"{path} has no knob {keyword.arg!r}{nearest(str(keyword.arg), fields)}")
            knobs[keyword.arg] = _build(keyword.value, text)
        try:
            return cls(**knobs)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
    if path := _path(node):
        cls = _class(path)
        try:
            return cls()
        except TypeError as error:
            raise UserError(f"{path} needs knobs: {error}") from None
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(f"method {text!r} is not understood; knobs are numbers, words in quotes or other methods") from None


def level_of(transform: Transform, level: Mapping[str, Any]) -> Any:
    """A method's level from plain values; nested levels too; unknown keys are refused."""
    return _dataclass(transform.level, level, type(transform).__name__)


def _dataclass(cls: type, values: Mapping[str, Any], owner: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"a level of {owner} has no {key!r}{nearest(key, fields)}")
    made = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            made[key] = _dataclass(_plain(_hints(cls)[key]), value, owner)
        else:
            made[key] = value
    try:
        return cls(**made)
    except (TypeError, ValueError) as error:
        raise UserError(f"a level of {owner} is not right: {error}") from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(hint: Any) -> type:
    """The dataclass inside `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint  # type: ignore[no-any-return]


def level_words(level: Any) -> dict[str, Any]:
    """The plain values of a level: what plans and menus store."""
    return dataclasses.asdict(level)
