"""What to calibrate on: the variants, their figures against the same run by `compress`, and what the sentences say."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import laconic
from laconic import advice, api, cli
from laconic.advice import Tried
from laconic.core.errors import UserError
from laconic.models import open_model
from laconic.zoo import nano


def tried(axis: advice.Axis, kl: float, more: float, width: float = 0.01, rows: int = 8, length: int = 64, data: str = "own") -> Tried:
    return Tried(axis, data, rows, length, kl, kl - 0.1, kl + 0.1, more, more - width, more + width, 1.0)


def test_variants_differ_along_one_axis_at_a_time():
    source = open_model(None, default=nano.path())
    inputs = torch.arange(16 * 128).reshape(16, 128)
    found = list(advice.variants(source, inputs, {"other": inputs[:6] + 1}))
    assert [(v.axis, v.data, tuple(v.inputs.shape)) for v in found] == [
        ("rows", "own", (16, 128)),
        ("rows", "own", (8, 128)),
        ("rows", "own", (4, 128)),
        ("length", "own", (32, 64)),
        ("length", "own", (64, 32)),
        ("data", "other", (6, 128)),
        ("data", "noise", (16, 128)),
    ]
    # fewer rows are rows of the data, from its first to its last; shorter ones are the same tokens in their order
    assert torch.equal(found[2].inputs[[0, -1]], inputs[[0, -1]])
    assert torch.equal(found[4].inputs.flatten(), inputs.flatten())
    assert int(found[-1].inputs.max()) < 4096 and not torch.equal(found[-1].inputs[0], found[-1].inputs[1])


def test_images_have_no_length():
    source = open_model(None, default=nano.path())
    found = list(advice.variants(source, torch.randn(8, 3, 4, 4), {}))
    assert [(v.axis, v.data, len(v.inputs)) for v in found] == [("rows", "own", 8), ("rows", "own", 4), ("data", "noise", 8)]


def test_what_the_sentences_say():
    whole = tried("rows", 0.5, 0.0, 0.0, rows=32)
    # a quarter of the rows does, an eighth does not
    said = advice.words([whole, tried("rows", 0.5, 0.0, rows=16), tried("rows", 0.5, 0.005, rows=8), tried("rows", 0.6, 0.1, rows=4)])
    assert said == ["8 rows do as well as all 32: KL 0.5 against 0.5."]
    said = advice.words([whole, tried("rows", 0.6, 0.1, rows=16), tried("rows", 0.5, 0.0, rows=8)])
    assert said == ["All 32 rows are of use, and more may be: KL 0.5, with 16 of them 0.6."]
    said = advice.words(
        [whole, tried("length", 0.75, 0.25, length=32), tried("data", 1.0, 0.5, data="wiki"), tried("data", 0.5, 0.0, data="noise")]
    )
    assert said[0].endswith("cut to 32 tokens a row KL is 0.75, 1.50 times that of 64.")
    assert said[1:] == ["wiki costs 2.00 times the KL of your data: 1.", "Noise, which needs no data, serves as well as your data: KL 0.5."]
    assert advice.words([whole, tried("length", 0.4, -0.1), tried("data", 0.4, -0.1, data="wiki")]) == [
        "Shorter rows are better here: cut to 64 tokens KL is 0.4 against 0.5.",
        "wiki is better than your data: KL 0.4 against 0.5.",
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small Llama with nano's tokenizer, and a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("advised")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # a random model's outputs hardly depend on its layers
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((nano.path() / name).read_bytes())
    for name in ("mine", "other"):
        lines = [json.dumps({"text": f"def {name}_{i}(x):\n    return {name} * {i} + x ** {i % 7}\n" * 6}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_the_figure_of_all_rows_is_that_of_the_run_that_follows(small, tmp_path):
    data = str(small / "mine.jsonl")
    found = api.advise(small / "model", data, also=[small / "other.jsonl"], budget="bits=7", recipe="gptq", log=lambda _: None)
    assert found["recipe"] == "gptq" and found["budget"] == ["bits=7"]
    assert {(one["axis"], one["data"]) for one in found["tried"]} >= {
        ("rows", "own"), ("length", "own"), ("data", "noise"), ("data", str(small / "other.jsonl"))
    }  # fmt: skip
    first = found["tried"][0]
    assert (first["more"], first["more_low"], first["more_high"]) == (0.0, 0.0, 0.0)
    assert all(one["kl"] > 0 and one["more_low"] <= one["more"] <= one["more_high"] for one in found["tried"])
    assert all(abs(one["kl"] - first["kl"] - one["more"]) < 1e-9 for one in found["tried"])
    # the search part's KL, as a run of compress measures it when its certify part is that text
    laconic.compress(small / "model", data, budget="bits=7", recipe="gptq", out=tmp_path / "out", log=lambda _: None)
    split = api._split(open_model(small / "model"), data, None, seed=0, log=lambda _: None)
    from laconic.artifact import Artifact
    from laconic.job import pointwise

    rows = pointwise(open_model(small / "model"), Artifact(tmp_path / "out"), split.search, batch=2).kl
    assert abs(float(rows.mean()) - first["kl"]) < 1e-6


def test_the_command_tells_figures_and_advice(small):
    arguments = ["advise", str(small / "model"), "--data", str(small / "mine.jsonl"), "--budget", "bits=7"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "your data" in done.output and "noise" in done.output and "more than all of yours" in done.output
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert found["advice"] and all(sentence.endswith(".") for sentence in found["advice"])


@pytest.mark.parametrize(("recipe", "words"), [("awq", "does more than round"), ("kangaroo", "rounds nothing")])
def test_what_is_not_tried_is_refused(small, recipe, words):
    with pytest.raises(UserError, match=words):
        api.advise(small / "model", small / "mine.jsonl", recipe=recipe, log=lambda _: None)
