"""Finds every method by itself: builds it with its defaults (a knob that is a method gets the plainest one), levels from the recipes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import typing
from typing import Any

import torch

from laconic.core.menu import Search
from laconic.core.packed import Packed
from laconic.core.score import Score
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.core.state import State
from laconic.core.statistic import (
    CrossGram,
    Extremes,
    Fisher,
    Gram,
    LookupFisher,
    Lookups,
    Norms,
    Opening,
    Peaks,
    Sample,
    Seen,
    Sizes,
    Total,
)
from laconic.core.transform import Lesson, Transform
from laconic.recipe import ROLES, build, level_of, load_recipe, named, paths

PLAINEST = {Transform: "quantize.round.rtn", Score: "prune.score.magnitude", Search: "search.allocate.uniform"}
STATISTICS = (
    Gram(),
    Fisher(),
    CrossGram(),
    Lookups(),
    LookupFisher(),
    Norms(),
    Peaks(),
    Sample(),
    Sizes(),
    Total("all"),
    Extremes(),
    Opening(),
)


def classes(role: type) -> list[tuple[str, type]]:
    """(name, class) of every method of a role."""
    found = []
    for path in paths():
        module = importlib.import_module(f"laconic.methods.{path}")
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, role):
                found.append((path, value))
    return found


def instance(cls: type) -> Any:
    """The method with its defaults."""
    hints = typing.get_type_hints(cls)
    knobs = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            knobs[field.name] = build(PLAINEST[hints[field.name]])
    return cls(**knobs)


def levels(path: str, transform: Transform) -> list[Any]:
    """Levels of a transform that the shipped recipes name, for it or, where none names it, for methods whose level is of the same type
    (so that a recipe may exchange them); at least one, or the method is not reachable by a user. Those with a grid also without it."""
    own, alike = [], []
    for name in named():
        for choice in load_recipe(name).choices:
            if build(choice.method).level is transform.level:
                alike += [level_of(transform, level) for level in choice.levels]
                if choice.method.split("(")[0] == path:
                    own += [level_of(transform, level) for level in choice.levels]
    found = own or alike
    found += [dataclasses.replace(level, grid=None) for level in found if getattr(level, "grid", None) is not None]
    return list(dict.fromkeys(found))


def lessons() -> list[tuple[str, Lesson]]:
    """(name, lesson) of every lesson with its defaults."""
    return [(path, instance(cls)) for path, cls in classes(Lesson)]


def states() -> list[tuple[str, Any]]:
    """(name, how to make one) of every state: with its defaults, and with each other word that one of its knobs may be."""
    found = []
    for path, cls in classes(State):
        found.append((path, cls))
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            words = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
            others = [word for word in words if word != field.default]
            found += [(f"{path}({field.name}={word})", functools.partial(cls, **{field.name: word})) for word in others]
    return found


def transforms() -> list[tuple[str, Transform, Any]]:
    """Every (name, transform, level), quantizers of what stays filled in where a level asks for one."""
    found = []
    for path, cls in classes(Transform):
        transform = instance(cls)
        if any(f.name == "hold" for f in dataclasses.fields(cls)):
            transform = dataclasses.replace(transform, hold=build(PLAINEST[Transform]))
        found += [(path, transform, level) for level in levels(path, transform)]
    return found


def fed(held: Packed, x: torch.Tensor) -> torch.Tensor:
    """What a form makes of its input before the product."""
    return x if held.feed is None else held.feed(x)


def site(n: int, m: int) -> Site:
    return Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (n, m))


def conv_site(n: int, channels: int, kernel: int) -> Site:
    return Site("layer", Conv(), {"weight": TensorId("layer.weight")}, (n, channels, kernel, kernel))


def stats_of(x: torch.Tensor, where: Site) -> dict[Any, torch.Tensor]:
    """What a pass over rows x (t, m) leaves behind, all transforms' wishes filled."""
    # samples of examples are compared by counts, which are never negative
    target, pool = Total("target"), Total("pool")
    seen = {Gram(): x, Norms(): x, Peaks(): x, Sample(): x, Extremes(): x, Opening(): x, target: x[: len(x) // 2].abs(), pool: x.abs()}
    return {kind: kind.finish(kind.update(kind.init(where), Seen(x=rows))) for kind, rows in seen.items()}


__all__ = ["ROLES", "Packed", "classes", "conv_site", "fed", "instance", "lessons", "levels", "site", "states", "stats_of", "transforms"]
