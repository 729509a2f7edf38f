"""Nested widths: the recipe matformer on small models, cut to narrower ones when it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import laconic
from laconic import artifact, models, pipeline
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress, quality_of
from laconic.models import open_model
from laconic.recipe import Recipe, load_recipe
from laconic.zoo import nano

SAYS = {"log": lambda line: None}


@pytest.fixture(scope="module")
def small(tiny: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """A Llama of two layers, wild enough that its neurons matter, and text for it."""
    return tiny(layers=2, blocks=200, intermediate_size=80, initializer_range=0.3)


def recipe_of(**more) -> Recipe:
    found = load_recipe("matformer").model_dump()
    return Recipe.model_validate({**found, "tune": "nest.width.matformer(steps=12, batch=2)", **more})


def split_of(small: tuple[Path, Path]):
    return open_data(str(small[1]), open_model(small[0]), seed=0, length=32, limits=(8, 4, 8))


def run(small: tuple[Path, Path], out: Path, recipe: Recipe | None = None, budget: tuple[str, ...] = ()):
    return compress(open_model(small[0]), split_of(small), budget=budget, recipe=recipe or recipe_of(), out=out, **SAYS)


@pytest.fixture(scope="module")
def made(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    run(small, out)
    return out


def ends(out: Path) -> list[int]:
    index = artifact.elastic(out)
    assert index is not None
    return [index.least, *(size for _, size in index.slices)]


def test_three_budgets_from_one_file_are_narrower_models(small: tuple[Path, Path], made: Path) -> None:
    source, split = open_model(small[0]), split_of(small)
    least, middle, whole = ends(made)[0], ends(made)[3], ends(made)[-1]
    found, widths = [], []
    for limit in (least, middle, whole):
        cut = artifact.stream(made, limit=limit)
        assert sum(info.stop - info.start for info in cut.infos.values()) == limit
        found.append(quality_of(source, cut, split.certify, metric=split.metric, batch=4)["kl_mean"])
        model = laconic.load(made, budget=f"size={limit}B")
        layers = [layer.mlp for layer in model.model.layers]
        assert all(type(layer.gate_proj) is type(layer.down_proj) is torch.nn.Linear for layer in layers)
        assert all(len(layer.gate_proj.weight) == len(layer.up_proj.weight) == layer.down_proj.weight.shape[1] for layer in layers)
        widths.append([len(layer.up_proj.weight) for layer in layers])
        # parameters and multiplications are fewer, and no mask is left
        assert sum(2 * p.numel() for p in model.parameters()) == limit
    assert widths == [[10, 10], [20, 40], [80, 80]]
    assert found[0] > found[1] > found[2]
    certificate = json.loads((made / "certificate.json").read_text())
    assert certificate["quality"]["kl_mean"] == pytest.approx(found[2], rel=1e-3)
    assert certificate["bytes"] == whole == artifact.bytes_of(made)
    assert certificate["elastic"][0]["kl_mean"] == pytest.approx(found[0], rel=1e-3)
    plan = json.loads((made / "plan.json").read_text())
    assert [group["counts"] for group in plan["nest"]["groups"]] == [[10, 20, 40, 80]] * 2
    # of the mean over sizes
    assert plan["judged"][1]["kl"] < plan["judged"][0]["kl"]


def test_only_the_bytes_of_the_prefix_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(handle: int, buffers: list, offset: int) -> int:
        got = real(handle, buffers, offset)
        ranges.append((offset, offset + got))
        return got

    monkeypatch.setattr(models.os, "preadv", preadv)
    header = 8 + int.from_bytes((made / "model.safetensors").read_bytes()[:8], "little")
    for limit in ends(made):
        ranges.clear()
        laconic.load(made, budget=f"size={limit}B")
        ranges.sort()
        assert ranges[0][0] == header and ranges[-1][1] == header + limit
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


def test_the_whole_loads_through_transformers_and_generates(small: tuple[Path, Path], made: Path) -> None:
    tokens = torch.randint(0, 4096, (2, 12))
    with torch.no_grad():
        same = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(laconic.load(made)(tokens).logits, same, rtol=1e-4, atol=1e-4)
    least = ends(made)[0]
    assert "".join(laconic.generate(made, "def", max_tokens=3, budget=f"size={least}B")) is not None

    def laconic_(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "laconic", *words], capture_output=True, text=True, check=False, timeout=300)

    shown = laconic_("measure", str(made), "--budget", f"size={least}B", "--data", str(small[1]), "--no-speed", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["bytes"] == least


def test_a_budget_below_the_model_cuts_it_first(small: tuple[Path, Path], made: Path, tmp_path: Path) -> None:
    certificate = run(small, tmp_path / "out", recipe_of(tune=None), ("size=97%",))
    whole = ends(tmp_path / "out")[-1]
    assert certificate["bytes"] == whole <= 0.97 * ends(made)[-1]
    widths = [len(layer.mlp.up_proj.weight) for layer in laconic.load(tmp_path / "out").model.layers]
    assert widths[0] == widths[1] < 80
    assert certificate["elastic"][0]["kl_mean"] > certificate["quality"]["kl_mean"] > 0
    # without what its recipe cuts first the model does not fit
    with pytest.raises(UserError, match="has no `cut` that makes it smaller"):
        run(small, tmp_path / "none", recipe_of(cut=None, tune=None), ("size=97%",))
    with pytest.raises(UserError, match="the least is"):
        run(small, tmp_path / "low", recipe_of(tune=None), ("size=20%",))


def test_cut_off_while_it_learns_it_ends_the_same(
    small: tuple[Path, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.learn

    def learn(*args, **more):
        monkeypatch.setattr(pipeline, "learn", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(small, tmp_path / "out")["files"] == json.loads((made / "certificate.json").read_text())["files"]


def test_biases_turned_weights_and_an_order_by_trial(tmp_path: Path) -> None:
    """OPT has biases in its feed-forward part; they are cut with the neurons."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 4096}
    config = OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3)
    model = OPTForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("fc1.bias"):
            torch.nn.init.normal_(p, std=0.3)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((nano.path() / name).read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(400)))
    pair = (tmp_path / "model", text)
    certificate = run(pair, tmp_path / "out", recipe_of(tune=None, order="nest.order.rounds"))
    tokens = torch.randint(0, 4096, (2, 12))
    with torch.no_grad():
        original = open_model(tmp_path / "model").load(torch.float32)(tokens).logits
        torch.testing.assert_close(laconic.load(tmp_path / "out")(tokens).logits, original, rtol=2e-2, atol=2e-2)
        narrow = laconic.load(tmp_path / "out", budget=f"size={ends(tmp_path / 'out')[1]}B")
        assert torch.isfinite(narrow(tokens).logits).all()
    widths = [(len(layer.fc1.weight), len(layer.fc1.bias), layer.fc2.weight.shape[1]) for layer in narrow.model.decoder.layers]
    assert sorted(widths) == [(8, 8, 8), (16, 16, 16)]
    assert certificate["elastic"][0]["kl_mean"] > certificate["quality"]["kl_mean"]
    with pytest.raises(UserError, match=r"load the folder with laconic\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_network_of_ones_own(tmp_path: Path, flat_net: Callable[[int], tuple[str, str]]) -> None:
    factory, data = flat_net(12)
    laconic.compress(factory, data, recipe=recipe_of(), out=tmp_path / "out", **SAYS)
    left = {one["group"]: one["why"] for one in json.loads((tmp_path / "out" / "plan.json").read_text())["nest"]["left"]}
    # a matrix has slices along one of its axes
    assert "other axis" in left["3"] and "inputs or outputs" in left["5"]
    x = torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        original = open_model(factory).load(torch.float32)(x)
        errors = []
        for limit in ends(tmp_path / "out"):
            model = laconic.load(tmp_path / "out", budget=f"size={limit}B")
            errors.append(float((model(x) - original).norm()))
    assert [model[1].weight.shape, model[3].weight.shape] == [(32, 48), (24, 32)]
    assert errors[-1] < errors[0]


def test_recipes_that_make_no_sense_are_refused() -> None:
    from laconic.recipe import check

    def refused(match: str, **more) -> None:
        with pytest.raises(UserError, match=match):
            check(recipe_of(**more))

    refused("says no `order`", order=None)
    refused("not yet", choices=({"method": "quantize.round.rtn", "levels": ({"bits": 4},)},))
    refused("weighs no channels", nest={"method": "quantize.round.rtn"})
    refused("learns part by part", tune="quantize.round.flexround")
    with pytest.raises(ValueError, match="rise from above 0 to 1"):
        recipe_of(nest={"method": "prune.cut.obspa", "widths": (0.5, 0.25, 1.0)})
