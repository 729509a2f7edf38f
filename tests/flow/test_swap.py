"""Any two methods of one role and kind exchanged in a recipe: the run finishes and its output is lawful."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from laconic import artifact, catalogue
from laconic.core.errors import UserError
from laconic.core.menu import Measuring
from laconic.core.score import Score
from laconic.core.site import Embedding, Site
from laconic.core.transform import Transform
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import KINDS, PROBE, Choice, Recipe, build, check, level_of, level_words, load_recipe, method_class, named

sys.path.insert(0, str(Path(__file__).parent.parent / "laws"))
import found

# levels of a choice that are enough to have a choice at all
LEVELS = 3
# of lessons
STEPS = 8
# of pairs in each suite
NEAR = 3
IN_RECIPES = ("Transform", "Score", "Search", "Lesson", "Cut", "Order", "Align")


def alike() -> dict[tuple[str, str], list[str]]:
    """(role, family.kind) -> names, where there are two or more."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in catalogue.entries():
        groups.setdefault((entry.role, entry.name.rpartition(".")[0]), []).append(entry.name)
    return {key: names for key, names in groups.items() if len(names) > 1}


def pairs() -> list[Any]:
    """(the one that a recipe names, the one put in its place), all ordered pairs. Those of the larger groups whose names stand more than
    NEAR apart, the group taken as a ring, are of the long suite: there are as many as the square of the methods."""
    found = []
    for (role, _), names in alike().items():
        for (i, old), (j, new) in itertools.permutations(enumerate(names), 2) if role in IN_RECIPES else ():
            apart = min((i - j) % len(names), (j - i) % len(names))
            found.append(pytest.param(old, new, marks=[pytest.mark.long] if apart > NEAR else []))
    return found


def written(name: str) -> str:
    """A method as a recipe writes it, with its defaults; a knob that has none gets the plainest method, and so does a quantizer of what
    stays, which levels with a grid need."""
    fields = dataclasses.fields(method_class(name))
    hints = {field.name: inspect.signature(method_class(name)).parameters[field.name].annotation for field in fields}
    none = [f.name for f in fields if f.name == "hold" or (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)]
    plainest = {"Transform": found.PLAINEST[Transform], "Transform | None": found.PLAINEST[Transform], "Score": found.PLAINEST[Score]}
    knobs = ", ".join(f"{knob}={plainest[str(hints[knob])]}" for knob in none)
    return f"{name}({knobs})" if knobs else name


def names_in(recipe: Recipe) -> set[str]:
    """Every method that a recipe names, knobs included."""
    return set(re.findall(r"[a-z]+(?:\.[a-z_0-9]+){2}", json.dumps(recipe.resolved())))


def short(recipe: Recipe) -> Recipe:
    """Fewer levels, first and last among them, few rows to price with, and few steps of what is restored."""
    choices = [
        choice.model_copy(update={"levels": (choice.levels[0], *choice.levels[1:-1][: LEVELS - 2], choice.levels[-1])})
        for choice in recipe.choices
    ]
    restore = None if recipe.restore is None else f"{recipe.restore.split('(')[0]}(steps=2, rank=4)"
    return recipe.model_copy(update={"choices": tuple(choices), "price_rows": 2, "restore": restore})


def hurried(text: str | None) -> str | None:
    """A lesson as it is written, of few steps: that it can be exchanged shows in the first ones."""
    if text is None:
        return None
    call = ast.parse(text, mode="eval").body
    func, keywords = (call.func, call.keywords) if isinstance(call, ast.Call) else (call, [])
    kept = [keyword for keyword in keywords if keyword.arg != "steps"]
    return ast.unparse(ast.Call(func, [], [*kept, ast.keyword("steps", ast.Constant(STEPS))]))


def holding(name: str) -> Recipe:
    """A shipped recipe that names the method; one that names another of its kind, with this in the other's place; or one that offers it
    beside round to nearest."""
    alikes = next(names for names in alike().values() if name in names)
    for other in (name, *alikes):
        for known in named():
            recipe = load_recipe(known)
            # what is measured of images in other ways has its own model
            if other in names_in(recipe) and not isinstance(build(recipe.search), Measuring):
                return short(recipe if other == name else exchanged(recipe, other, name))
    transform = build(written(name))
    levels = [level_words(level) for level in found.levels(name, transform)[:LEVELS]]
    finest = {"method": "quantize.round.rtn", "levels": [{"bits": 8, "group": 64}]}
    return Recipe.model_validate({"name": "own", "choices": [{"method": written(name), "levels": levels, "kinds": ["linear"]}, finest]})


class Exchange(ast.NodeTransformer):
    """One method's name for another's, with the knobs that both have."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node = self.generic_visit(node)  # type: ignore[assignment]
        if ast.unparse(node.func) != self.new:
            return node
        plain = ast.parse(written(self.new), mode="eval").body
        knobs = {field.name for field in dataclasses.fields(method_class(self.new))}
        # rates name a method's own parameters
        kept = [keyword for keyword in node.keywords if keyword.arg in knobs and keyword.arg != "rates"]
        have = {keyword.arg for keyword in kept}
        more = [keyword for keyword in getattr(plain, "keywords", []) if keyword.arg not in have]
        return ast.Call(node.func, [], [*kept, *more])

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        # what stays of a row has no statistics of its columns: this place takes quantizers that want none
        if node.arg == "hold" and getattr(build(written(self.new)), "wants", ()):
            return node
        # a method inside another is given levels by that one: this place takes methods that know them
        levels = [getattr(build(written(name)), "level", None) for name in (self.old, self.new)]
        if node.arg in ("hold", "first") and levels[0] is not levels[1]:
            return node
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.parse(self.new if ast.unparse(node) == self.old else ast.unparse(node), mode="eval").body

    def __call__(self, text: str) -> str:
        found = self.visit(ast.parse(text, mode="eval").body)
        plain = isinstance(found, ast.Attribute) and ast.unparse(found) == self.new
        return written(self.new) if plain else ast.unparse(found)


def taken(transform: Transform, levels: Any) -> bool:
    """Whether a method takes levels of its type, or says in a sentence that they are another's (as of codebooks and formats)."""
    try:
        return all(transform.stored(PROBE, level_of(transform, level)) > 0 for level in levels)
    except ValueError:
        return False


def exchanged(recipe: Recipe, old: str, new: str) -> Recipe:
    """The recipe with one method in the other's place, at the levels that it has where the types differ."""
    exchange = Exchange(old, new)
    choices = []
    for choice in recipe.choices:
        method = exchange(choice.method)
        levels: Any = choice.levels
        transform = build(method)
        if build(choice.method).level is not transform.level or not taken(transform, levels):
            levels = tuple(level_words(level) for level in found.levels(method.split("(")[0], transform)[:LEVELS])
        for level in levels:
            level_of(transform, level)
        # one that acts on other sites is offered those of them that the recipe means
        before = build(choice.method).acts_on
        both = tuple(word for word in choice.kinds if KINDS[word] in before and KINDS[word] in transform.acts_on)
        kinds = choice.kinds if before == transform.acts_on else both or Choice.model_fields["kinds"].default
        if not both and set(before) & set(transform.acts_on):
            # what this choice is for is nothing to the other one
            continue
        choices.append(choice.model_copy(update={"method": method, "levels": levels, "kinds": kinds}))
    # one level for all matrices is to be had only where all choices offer it
    apart = len({json.dumps([level_words(level) if dataclasses.is_dataclass(level) else level for level in c.levels]) for c in choices}) > 1
    search = "search.allocate.knapsack" if apart and recipe.search == "search.allocate.uniform" else exchange(recipe.search)
    return recipe.model_copy(
        update={
            "choices": tuple(choices),
            "search": search,
            "tune": exchange(recipe.tune) if recipe.tune else None,
            "order": exchange(recipe.order) if recipe.order else None,
            "route": exchange(recipe.route) if recipe.route else None,
            "cut": recipe.cut.model_copy(update={"method": exchange(recipe.cut.method)}) if recipe.cut else None,
            "align": recipe.align.model_copy(update={"method": exchange(recipe.align.method)}) if recipe.align else None,
        }
    )


@pytest.mark.parametrize(("old", "new"), pairs())
def test_exchanged_methods_give_lawful_output(small: tuple[Path, Path], tmp_path: Path, old: str, new: str) -> None:
    recipe = holding(old)
    if catalogue.find(old).role != "Lesson":
        recipe = recipe.model_copy(update={"tune": None})
    recipe = exchanged(recipe, old, new)
    recipe = recipe.model_copy(update={"tune": hurried(recipe.tune)})
    assert new in names_in(recipe)
    check(recipe)
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 4))
    # what leaves the table as it is cannot go as far, and the table is large here; nor can stacks of matrices so small
    bits = 16 if recipe.nest else 15 if recipe.cut or recipe.order or recipe.search == "prune.schedule.finercut" else 8.5
    # where 8 bits are the least that is offered, scales and norms come on top
    table = Site("model.embed_tokens", Embedding(), {}, (1, 1))
    tables = [choice for choice in recipe.choices if Embedding in build(choice.method).acts_on and choice.offers(table)]
    bits = 16 if recipe.choices and not tables else bits
    bits = 9 if all(level.get("bits") == 8 for choice in recipe.choices for level in choice.levels) and bits == 8.5 else bits
    certificate = compress(source, split, budget=[f"bits={bits}"], recipe=recipe, out=tmp_path / "out", log=lambda _: None)
    assert certificate["bytes"] == artifact.bytes_of(tmp_path / "out") <= bits * source.parameters / 8
    assert certificate["reload"]["difference"] <= 1e-4
    artifact.verify_hashes(tmp_path / "out")
    logits = laconic.load(tmp_path / "out")(torch.arange(12)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_a_method_inside_another_that_does_not_know_its_levels_is_refused_in_a_sentence() -> None:
    for outer, knobs in (("quantize.residual.lorc", "first"), ("prune.cut.drop", "score=prune.score.wanda, hold")):
        recipe = load_recipe("auto")
        chosen = next(choice for choice in recipe.choices if choice.method.startswith(outer))
        other = chosen.model_copy(update={"method": f"{outer}({knobs}=quantize.round.floats)"})
        with pytest.raises(UserError, match=r"has levels of its own.*such as quantize\.round\.rtn"):
            check(recipe.model_copy(update={"choices": (other,)}))


def test_every_group_is_exchanged() -> None:
    assert {"quantize.round.rtn", "prune.score.wanda", "search.allocate.uniform"} <= {name for pair in pairs() for name in pair.values}
    # caches are no part of a recipe, and are exchanged below, as are routers; forms are what methods hold
    assert {role for role, _ in alike()} - set(IN_RECIPES) <= {"State", "Router", "Packed"}


@pytest.mark.parametrize("name", ["route.gate.factorllm(steps=2, batch=2)", "prune.activation.chess"])
def test_exchanged_routers_run(small: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 4))
    recipe = load_recipe("factorllm").model_copy(update={"route": name})
    found = compress(source, split, budget=[], recipe=recipe, out=tmp_path / "out", log=lambda _: None)
    assert found["reload"]["ok"] and found["multiplications"]["expected"] < found["multiplications"]["dense"]


def test_a_router_for_other_layers_is_refused_before_work(small: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = exchanged(load_recipe("factorllm"), "route.gate.factorllm", "route.gate.ftwt")
    check(recipe)
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 4))
    with pytest.raises(UserError, match="finds nothing to route"):
        compress(source, split, budget=[], recipe=recipe, out=tmp_path / "out", log=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for (role, _), names in alike().items() if role == "State" for name in names])
def test_exchanged_caches_generate(small: tuple[Path, Path], name: str) -> None:
    model = laconic.load(small[0])
    ids = torch.arange(40).reshape(2, 20)
    out = model.generate(ids, past_key_values=laconic.cache(model, name), max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 26)
