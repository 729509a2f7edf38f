"""Sub-layers that go: the whole job, the folder that lacks them, its cache, and a price list in which they stand beside bits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import laconic
from laconic import artifact
from laconic.core.menu import Budget, cheapest, plan_of
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.pipeline import menu_of
from laconic.recipe import build, load_recipe

ATTENTIONS = """
search: prune.schedule.finercut
judge: false
keep: '.*mlp|model\\.layers\\.1\\.self_attn'
choices:
  - {method: prune.cut.sublayer, kinds: [sublayer], levels: [{}]}
"""
MIXED = """
search: search.allocate.knapsack
choices:
  - {method: quantize.round.rtn, levels: [{bits: 8, group: 16}, {bits: 4, group: 16}]}
  - {method: prune.cut.sublayer, kinds: [sublayer], levels: [{}]}
"""
STEPS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def run(small, out: Path, recipe: str, budget: str, **more):
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))
    return compress(source, split, budget=[budget], recipe=load_recipe(recipe), out=out, log=lambda _: None, **more)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def cut(small, tmp_path_factory) -> Path:
    """A folder without the first and the last attention: the budget is one byte below what the model without one of them has."""
    folder = tmp_path_factory.mktemp("cut")
    source = open_model(small[0])
    one = sum(2 * math.prod(source.infos[name].shape) for name in source.anatomy.sublayers()[0].covers)
    size = (2 * source.parameters - one - 1) / 1e6
    run(small, folder / "out", written(folder / "attentions.yaml", ATTENTIONS), f"size={size:.6f}MB")
    return folder / "out"


def test_the_folder_lacks_what_went(small, cut):
    source, plan = open_model(small[0]), json.loads((cut / "plan.json").read_text())
    gone = {"model.layers.0.self_attn", "model.layers.2.self_attn"}
    assert {choice["site"] for choice in plan["choices"]} == gone
    names = {name for site in source.anatomy.sublayers() if site.name in gone for name in site.covers}
    # q, k, v, o and the norm before them
    assert len(names) == 10
    stored = set(artifact.stream(cut).stored)
    assert stored == set(source.infos) - names
    certificate = json.loads((cut / "certificate.json").read_text())
    counted = sum(2 * math.prod(source.infos[name].shape) for name in stored)
    assert certificate["bytes"] == artifact.bytes_of(cut) == counted == plan["predicted"]["bytes"]
    assert certificate["reload"]["difference"] <= 1e-6
    # every stored tensor of the original is settled once
    settled = [name for choice in plan["choices"] for name in choice["covers"]] + [entry["tensor"] for entry in plan["kept"]]
    assert sorted(settled) == sorted(source.infos)
    artifact.verify_hashes(cut)


def test_all_who_read_it_compute_the_same(small, cut, tmp_path):
    tokens = torch.randint(3, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = artifact.load(cut), AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    plain = open_model(small[0]).load(torch.float32)
    for number in (0, 2):
        plain.model.layers[number].self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():
        wanted = plain(tokens).logits
        for model in (ours, theirs):
            assert not {name for name, _ in model.named_parameters() if "layers.0.self_attn" in name or "layers.0.input_layernorm" in name}
            torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-6)
        # and once more, saved by transformers
        theirs.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        torch.testing.assert_close(again(tokens).logits, wanted, rtol=1e-5, atol=1e-6)


def test_the_cache_is_right_without_the_first_attention(cut):
    model = artifact.load(cut)
    tokens = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **STEPS)
    for cache in (None, laconic.cache(model, "cache.store.full")):
        found = model.generate(tokens, attention_mask=mask, past_key_values=cache, **STEPS)
        assert torch.equal(found, plain)
    # beams take rows over, drafts take tokens back
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        prompt = tokens[:1]
        own = model.generate(prompt, attention_mask=torch.ones_like(prompt), **STEPS, **more)
        held = laconic.cache(model, "cache.store.full")
        assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=held, **STEPS, **more), own)
    # one attention of three is left, so a third of the bytes is
    held, whole = laconic.cache(model, "cache.store.kivi(bits=2)"), laconic.cache(model, "cache.store.full")
    for cache in (held, whole):
        model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **STEPS)
    assert whole.nbytes == 2 * 2 * (40 + 11) * 2 * 8 * 4
    assert set(held.state.layers) == {1}


def test_what_went_can_stand_beside_bits(small, tmp_path):
    """One exact cover: a matrix has bits, or is gone with its sub-layer; a norm stays, or is gone with it."""
    recipe = written(tmp_path / "mixed.yaml", MIXED)
    source = open_model(small[0])
    certificate = run(small, tmp_path / "out", recipe, "bits=4.4")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    taken = {choice["site"] for choice in plan["choices"] if choice["method"] == "prune.cut.sublayer"}
    settled = [name for choice in plan["choices"] for name in choice["covers"]] + [entry["tensor"] for entry in plan["kept"]]
    assert sorted(settled) == sorted(source.infos)
    menu = menu_of(plan)
    # 4 bits for all that is left is 4.5 and more with its scales, so something had to go
    assert taken
    assert certificate["bytes"] == artifact.bytes_of(tmp_path / "out") <= 4.4 * source.parameters / 8
    solved = build("search.allocate.knapsack")(menu, Budget(plan["budget"]["bytes"]), judge=None, rng=torch.Generator(), log=lambda _: None)
    assert solved == plan_of(menu, solved.rows)
    # nothing of any block but the table at its coarsest and the last norm
    fixed = 2 * math.prod(source.infos["model.norm.weight"].shape)
    assert cheapest(menu) == fixed + min(row.cost.bytes for row in menu.rows if row.site == "model.embed_tokens")
    assert all(row.damage.value > 0 for row in menu.rows if row.method == "prune.cut.sublayer")
    model = artifact.load(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


def test_a_budget_below_what_may_go_is_refused(small, tmp_path):
    with pytest.raises(laconic.core.errors.UserError, match="below what recipe"):
        run(small, tmp_path / "out", "finercut", "size=1%")


def test_a_report_shows_what_went_and_what_stayed(small, cut, tmp_path):
    page = Path(laconic.report(cut, extras=False)).read_text()
    assert "model.layers.0.self_attn" in page or "sublayer" in page
    # and where all may stay
    out = tmp_path / "out"
    certificate = run(small, out, "finercut", "size=100%")
    assert certificate["quality"]["kl_mean"] == 0
    assert json.loads((out / "plan.json").read_text())["choices"] == []
    assert "<html" in Path(laconic.report(out, extras=False)).read_text()
