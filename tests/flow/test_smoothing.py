"""A Llama whose channels are scaled, rounded, written, and read by both doors; ranges that are learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import laconic
from laconic.core.site import Norm
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import build, load_recipe

BUDGETS = {"awq": "bits=4.7", "smoothquant": "bits=9", "lwc": "bits=3.7"}


@pytest.fixture(scope="module")
def loud(small, tmp_path_factory) -> tuple[Path, Path]:
    """The small Llama with norms that let a few channels through sixteen times as loud; what reads them has made up for it."""
    folder = tmp_path_factory.mktemp("loud")
    source = open_model(small[0])
    model = source.load(torch.bfloat16)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for edge in source.anatomy.edges():
            if edge.writers and isinstance(edge.writers[0].site.kind, Norm):
                own[edge.writers[0].site.tensors["weight"].name][3::16] *= 16
                for reader in edge.readers:
                    own[reader.site.tensors["weight"].name][:, 3::16] /= 16
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((small[0] / name).read_bytes())
    return folder, small[1]


def run(folder: Path, text: Path, recipe: str, out: Path) -> dict:
    source = open_model(folder)
    split = open_data(str(text), source, seed=0, length=24, limits=(8, 2, 4))
    return compress(source, split, budget=[BUDGETS[recipe]], recipe=load_recipe(recipe), out=out, log=lambda _: None)


@pytest.mark.parametrize("recipe", BUDGETS)
def test_the_whole_job_and_both_doors(loud, tmp_path, recipe):
    certificate = run(*loud, recipe, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert certificate["reload"]["ok"]
    if recipe != "lwc":
        moves = plan["align"]["moves"]
        assert plan["align"]["difference"] < 1e-5 and {"model.layers.0.input_layernorm", "model.layers.2.post_attention_layernorm"} <= set(
            moves
        )
        # scales are searched along v and up too, smoothing stays with the norms
        assert any(name.endswith((".value", ".gate")) for name in moves) == (recipe == "awq")
        assert "residual" in plan["align"]["left"]
    ours, theirs = laconic.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(1, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    # the config is the model's own: nothing has to be known of scales that lie in norms
    assert type(theirs).__name__ == "LlamaForCausalLM"


def test_scales_help_where_channels_are_loud(loud, tmp_path):
    scaled = run(*loud, "awq", tmp_path / "scaled")["quality"]["kl_mean"]
    recipe = load_recipe("awq").model_copy(update={"align": None})
    source = open_model(loud[0])
    split = open_data(str(loud[1]), source, seed=0, length=24, limits=(8, 2, 4))
    plain = compress(source, split, budget=[BUDGETS["awq"]], recipe=recipe, out=tmp_path / "plain", log=lambda _: None)
    assert scaled < plain["quality"]["kl_mean"]


def test_the_shipped_recipes():
    awq, smooth, lwc = (load_recipe(name) for name in BUDGETS)
    # ranges of q and k, whose errors meet in a product, stay whole; in one recipe all matrices have a choice of the same levels
    assert {choice.method for choice in awq.choices} == {"quantize.round.clipped", "quantize.round.rtn"}
    assert awq.choices[0].levels == awq.choices[1].levels == load_recipe("rtn").choices[0].levels == lwc.choices[0].levels
    assert build(awq.align.method).bits == 4 and build(smooth.align.method).alpha == 0.5
    assert build(lwc.tune).steps == build(load_recipe("flexround").tune).steps
