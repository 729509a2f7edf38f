"""Schemes by their names: no budget is needed, a given one is checked; what has no edges is not refused; weights that are moved first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import laconic
from laconic import job
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import Recipe, load_recipe

SCHEMES = {"w8a8": 8.6, "w4a8": 4.5, "w4a8-channel": 5.1, "w4a16": 4.5, "w3a16": 3.5, "w3a16-channel": 4.1, "w2a16": 2.6, "ptq161": 3.9}


def quicker(name: str) -> Recipe:
    """A scheme whose lessons take two steps."""
    recipe = load_recipe(name)
    changes = {}
    if recipe.tune is not None:
        changes["tune"] = f"{recipe.tune.split('(')[0]}(steps=2)"
    if recipe.restore is not None:
        changes["restore"] = "quantize.restore.restorative(steps=2, rank=4)"
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
    for name in (*SCHEMES, "mxfp4", "fp8"):
        assert not load_recipe(name).chooses
    for name in ("rtn", "auto", "gptq"):
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


def test_a_recipe_that_acts_on_little_of_a_model_says_so(flat_net, tmp_path):
    factory, data = flat_net(4)
    for keep, told in (("1|3", True), ("5", False)):
        lines: list[str] = []
        recipe = load_recipe("fp8").model_copy(update={"keep": keep})
        laconic.compress(factory, data, recipe=recipe, out=tmp_path / f"out{told}", log=lines.append)
        notes = json.loads((tmp_path / f"out{told}" / "plan.json").read_text())["notes"]
        said = [note for note in notes if "acts on 4." in note and "kept as they are" in note]
        assert bool(said) == told and all(note in lines for note in said)


def test_weights_that_are_moved_first_are_taken_for_the_model(small, tmp_path):
    moves = "quantize.restore.restorative(steps=8, rank=4, rates=(('a', 0.1), ('b', 0.1)))"
    recipe = quicker("ptq161").model_copy(update={"restore": moves, "tune": None})
    run(small, recipe, tmp_path / "moved")
    run(small, recipe.model_copy(update={"restore": None}), tmp_path / "plain")
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("moved", "plain")]
    assert plans[0]["recipe"]["restore"] == moves and "restore" not in plans[1]["recipe"]
    assert any("matrices moved before anything else, tuned over 8 steps: KL" in note for note in plans[0]["notes"])
    # the original is what is named, hashed and measured against
    assert plans[0]["model"] == plans[1]["model"]
    first, second = (laconic.load(tmp_path / name).state_dict() for name in ("moved", "plain"))
    assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in second.items()}
    signs = [name for name in first if name.endswith(".signs")]
    flipped = sum(int((first[name] != second[name]).sum()) for name in signs)
    assert signs and flipped > 0


@pytest.mark.parametrize("name", ["quantize.train.straight", "quantize.train.pv"])
def test_what_moves_weights_and_what_tunes_forms_may_take_each_others_place(small, tmp_path, name):
    recipe = quicker("ptq161").model_copy(update={"restore": f"{name}(steps=2)", "tune": "quantize.restore.restorative(steps=2, rank=4)"})
    found = run(small, recipe, tmp_path / "out")
    assert found["reload"]["ok"] and found["bytes"] == run(small, quicker("ptq161"), tmp_path / "plain")["bytes"]


@pytest.mark.parametrize("stage", ["before/first/model.layers.0", "before/learned/model.layers.1", "restored"])
def test_a_run_that_stops_while_weights_are_moved_goes_on(small, tmp_path, monkeypatch, stage):
    class Stopped(Exception):
        pass

    finish, made = job.Work.finish, []

    def until(self, key, value, tensors=None):
        finish(self, key, value, *([] if tensors is None else [tensors]))
        made.append(key)
        if key == stage:
            raise Stopped

    recipe = quicker("ptq161")
    whole = run(small, recipe, tmp_path / "whole")
    monkeypatch.setattr(job.Work, "finish", until)
    with pytest.raises(Stopped):
        run(small, recipe, tmp_path / "out")
    before = set(made)
    made.clear()
    stage = ""
    again = run(small, recipe, tmp_path / "out")
    assert again["files"] == whole["files"]
    assert not before & set(made), "nothing that was finished is done again"


def test_what_cannot_be_moved_is_refused(small, tmp_path, monkeypatch):
    recipe = load_recipe("ptq161")
    for changes, words in (
        ({"restore": "quantize.round.rtn"}, "is no lesson over the whole model; try quantize.restore.restorative"),
        ({"restore": "quantize.train.scales"}, "is no lesson over the whole model"),
        ({"cut": {"method": "prune.cut.obspa", "keep": 0.9}}, "`restore` beside `cut` is not there yet"),
        ({"choices": [], "decode": "decode.draft.kangaroo"}, "`restore` beside `decode`"),
    ):
        path = tmp_path / "wrong.yaml"
        path.write_text(json.dumps({**json.loads(recipe.model_dump_json(exclude_none=True)), **changes}))
        with pytest.raises(UserError, match=words):
            load_recipe(str(path))
    monkeypatch.setattr("laconic.restoring.TUNABLE", 10)
    with pytest.raises(UserError, match="is for 10 of them at most"):
        run(small, quicker("ptq161"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
