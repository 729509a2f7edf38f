"""Schemes by their names: no budget is needed, a given one is checked; what has no edges is not refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import laconic
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import Recipe, load_recipe

SCHEMES = {"w8a8": 8.6, "w4a8": 4.5, "w4a16": 4.5, "w3a16": 3.5, "w2a16": 2.6}


def quicker(name: str) -> Recipe:
    """A scheme whose lessons take two steps."""
    recipe = load_recipe(name)
    changes = {}
    if recipe.tune is not None:
        changes["tune"] = f"{recipe.tune.split('(')[0]}(steps=2)"
    return recipe.model_copy(update=changes)


def run(small, recipe: Recipe, out: Path, budget=(), **more) -> dict:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=24, limits=(8, 2, 4))
    return compress(source, split, budget=budget, recipe=recipe, out=out, log=lambda _: None, **more)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_needs_no_budget_and_holds_the_blocks_in_its_bits(small, tmp_path, name):
    certificate = run(small, quicker(name), tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert certificate["reload"]["ok"] and certificate["budget"] == {"words": [], "bytes": None}
    source = open_model(small[0])
    inside = {site.tensors["weight"].name: site.matrix for part in source.anatomy.segments() if part.name for site in part.sites}
    held = {cover: choice["bytes"] for choice in plan["choices"] for cover in choice["covers"]}
    # tables and heads stay; everything inside the layers is held
    assert set(held) == set(inside)
    assert 8 * sum(held.values()) / sum(n * m for n, m in inside.values()) < SCHEMES[name]
    ids = torch.randint(1, 4096, (2, 16), generator=torch.Generator().manual_seed(2))
    ours, theirs = laconic.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_schemes_are_found_in_capitals_and_a_budget_beside_one_is_checked(small, tmp_path):
    assert load_recipe("W4A16") == load_recipe("w4a16")
    for name in (*SCHEMES, "mxfp4"):
        assert not load_recipe(name).chooses
    for name in ("rtn", "auto", "gptq", "fp8"):
        assert load_recipe(name).chooses
    with pytest.raises(UserError, match="is below what recipe w4a16 can reach"):
        run(small, quicker("w4a16"), tmp_path / "out", ["bits=2"])
    with pytest.raises(UserError, match="no budget given"):
        run(small, load_recipe("gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_moved_a_scheme_says_so_and_goes_on(flat_net, tmp_path):
    factory, data = flat_net(24)
    made = laconic.compress(factory, data, recipe="w8a8", out=tmp_path / "out", log=lambda _: None)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert "align" not in plan and any("finds no edge of this model" in note for note in plan["notes"])
    assert made.certificate["quality"]["top1_agreement"] > 0.9
    with pytest.raises(UserError, match="known of language models"):
        laconic.compress(factory, data, recipe="smoothquant", budget="bits=10", out=tmp_path / "no", log=lambda _: None)
