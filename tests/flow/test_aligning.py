"""A Mamba rewritten, rounded with its inputs, written, and read by both doors; what cannot be aligned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

import laconic
from laconic import job, pipeline
from laconic.artifact import stream
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import HOME, load_recipe
from laconic.zoo import corpus, nano

STEPS = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A random Mamba of 2 layers with nano's tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("mamba")
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 2, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((nano.path() / name).read_bytes())
    blocks = "\n\n".join(text for _, text in corpus.named("search")).split("\n\n")[:160]
    (folder / "text.txt").write_text("\n\n".join(blocks), encoding="utf-8")
    return folder


def run(folders: Path, out: Path, recipe: str = "mambaquant", budget: str = "bits=9", **more):
    source = open_model(folders / "model")
    split = open_data(str(folders / "text.txt"), source, seed=0, length=24, limits=(4, 2, 4))
    return compress(source, split, budget=[budget], recipe=load_recipe(recipe), out=out, log=lambda _: None, **more)


@pytest.fixture(scope="module")
def made(folders) -> Path:
    run(folders, folders / "out")
    return folders / "out"


def altered(path: Path, **changes) -> str:
    """The shipped recipe with other entries."""
    found = yaml.safe_load((HOME / "recipes" / "mambaquant.yaml").read_text())
    path.write_text(yaml.safe_dump({**found, **changes}))
    return str(path)


def test_the_whole_job(folders, made):
    plan, certificate = (json.loads((made / name).read_text()) for name in ("plan.json", "certificate.json"))
    assert plan["align"]["difference"] < 1e-5 and len(plan["align"]["moves"]) == 7
    # what norms give is turned with the stream, and stretched by other methods
    assert plan["align"]["left"] == ["backbone.layers.0.norm", "backbone.layers.1.norm", "backbone.norm_f"]
    kept = {entry["tensor"]: entry["why"] for entry in plan["kept"]}
    assert kept["backbone.layers.0.mixer.gate_scale"] == "held by a part that stands in the model"
    # the step projection runs as a module, so it is held like any other
    chosen = {entry["site"]: entry["method"] for entry in plan["choices"]}
    assert "backbone.layers.1.mixer.dt_proj" in chosen and "hadamard" in chosen["backbone.layers.0.mixer.out_proj"]
    assert certificate["quality"]["kl_mean"] < 1e-3 and certificate["reload"]["difference"] < 1e-5
    assert certificate["bytes"] == plan["predicted"]["bytes"] == sum(i.stop - i.start for i in stream(made).stored.values())


def test_both_doors_compute_what_was_searched(folders, made):
    ours, theirs = laconic.load(made), AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = torch.randint(1, 4096, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
        # a dense copy rounds its inputs all the same
        torch.testing.assert_close(laconic.load(made, thaw=True)(ids).logits, logits, rtol=1e-4, atol=1e-5)
        original = AutoModelForCausalLM.from_pretrained(folders / "model", dtype=torch.float32)(ids).logits
        assert 1e-4 < float((logits - original).norm() / original.norm()) < 0.1
    assert torch.equal(ours.generate(ids[:1, :8], **STEPS), theirs.generate(ids[:1, :8], **STEPS))


def test_the_cache_gives_what_the_whole_text_gives(made):
    model = laconic.load(made)
    ids = torch.randint(1, 4096, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        parts = [out.logits]
        for i in range(9, 12):
            out = model(ids[:, i : i + 1], cache_params=out.cache_params, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["align", "align/exact", "solved/backbone.layers.0"])
def test_a_stopped_run_goes_on_and_ends_the_same(folders, made, tmp_path, monkeypatch, stage):
    class Stopped(Exception):
        pass

    finish = job.Work.finish

    def until(self, key, value, tensors=None):
        finish(self, key, value, *([] if tensors is None else [tensors]))
        if key == stage:
            raise Stopped

    monkeypatch.setattr(job.Work, "finish", until)
    with pytest.raises(Stopped):
        run(folders, tmp_path / "out")
    monkeypatch.setattr(job.Work, "finish", finish)
    if stage != "align":
        monkeypatch.setattr("laconic.aligning._seen", lambda *_: pytest.fail("what was seen is looked at again"))
    run(folders, tmp_path / "out")
    hashes = [json.loads((out / "certificate.json").read_text())["files"] for out in (made, tmp_path / "out")]
    assert hashes[0] == hashes[1]


def test_a_plan_that_was_made_before_is_taken(folders, made, tmp_path):
    run(folders, tmp_path / "out", plan=json.loads((made / "plan.json").read_text()))
    names = ["model.safetensors", "config.json"]
    found = [[json.loads((out / "certificate.json").read_text())["files"][name] for name in names] for out in (made, tmp_path / "out")]
    assert found[0] == found[1]


def test_later_layers_see_rounded_inputs(folders, made):
    """The applied model, walked segment by segment, rounds as the written one does; dense weights alone would not."""
    source = open_model(folders / "model")
    ids = torch.randint(1, 4096, (2, 16), generator=torch.Generator().manual_seed(2))
    walked = next(pipeline.finished_logits(stream(made), ids, 2))
    with torch.no_grad():
        torch.testing.assert_close(walked, laconic.load(made)(ids).logits, rtol=1e-4, atol=1e-5)
    assert load_recipe("mambaquant").resolved()["align"]["method"].startswith("quantize.rotate.mambaquant")
    assert "align" not in load_recipe("rtn").resolved() and source.parameters > 0


def test_lessons_and_searches_that_measure_see_rounded_inputs(folders, tmp_path):
    levels = [{"weight": {"bits": bits, "group": None, "symmetric": True}, "inputs": 6} for bits in (8, 4)]
    choices = [{"method": "quantize.round.inputs(hold=quantize.round.rtn)", "levels": levels}]
    recipe = altered(
        tmp_path / "evolved.yaml",
        choices=choices,
        search="search.evolve.evopress(start=search.allocate.uniform, generations=2, offspring=4)",
        price_rows=2,
    )
    found = run(folders, tmp_path / "evolved", recipe, "bits=7")
    assert found["reload"]["ok"]
    recipe = altered(tmp_path / "tuned.yaml", choices=choices, tune="quantize.train.straight(steps=4, batch=2)")
    found = run(folders, tmp_path / "tuned", recipe, "bits=7")
    assert found["reload"]["ok"]


def test_what_cannot_be_aligned_is_refused(folders, small, tmp_path):
    with pytest.raises(UserError, match="finds no edge of this model"):
        run(small[0].parent, tmp_path / "out")
    for changes, words in (
        ({"align": {"method": "quantize.round.rtn"}}, "rewrites no model along its edges; try quantize.rotate.mambaquant"),
        ({"align": {"method": "quantize.rotate.mambaquant(basis='x')"}}, "'klt', 'hadamard' or 'none'"),
        ({"choices": []}, "give it `choices`"),
        ({"cut": {"method": "prune.cut.obspa"}}, "do not go together yet"),
        ({"align": {"method": "quantize.rotate.mambaquant", "edges": ".*"}}, "unknown key 'align.edges'"),
        ({"choices": [{"method": "quantize.rotate.hadamard(hold=quantize.prune.x)", "levels": [{}]}]}, "unknown method"),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            load_recipe(altered(tmp_path / "wrong.yaml", **changes))
