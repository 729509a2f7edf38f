"""Decoders on models of transformers: other architectures, what is refused, and the road of an adapter from a recipe to `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import laconic
from laconic import api, artifact
from laconic.core.decoder import Draw
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.decoding import Layers, body_of
from laconic.job import compress
from laconic.methods.cache.store.full import Full
from laconic.methods.decode.draft.kangaroo import Kangaroo
from laconic.models import open_model
from laconic.recipe import Choice, Recipe, check, load_recipe

QUICK = "decode.draft.kangaroo(tap=1, steps=6, eta=0.05)"


def tiny(kind: str, **knobs: object) -> PreTrainedModel:
    torch.manual_seed(0)
    plain = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**{**plain, **knobs})
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    # in fp64 no two tokens are as likely but for rounding
    return getattr(transformers, name)(config).double().eval()


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 3, "n_head": 2}),
        ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        ("Gemma", {"head_dim": 8}),
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {}),
        ("GPTNeoX", {}),
    ],
)
def test_other_decoders(kind: str, knobs: dict[str, object]) -> None:
    model = tiny(kind, **knobs)
    prompt = torch.randint(1, 31, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = model.generate(prompt, do_sample=False, max_new_tokens=16, pad_token_id=0)[:, 20:]
    decoder = Kangaroo(tap=1, eta=0.05)
    parts = {path: part.double() for path, part in decoder.place(body_of(model.config), torch.Generator().manual_seed(0)).place.items()}
    with torch.inference_mode():
        rounds = list(decoder(Layers(model, Full(), parts), prompt, limit=16, draw=Draw()))
    assert torch.equal(torch.cat([one.tokens for one in rounds], 1), expected)
    # the model is left as it was
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=16, pad_token_id=0)[:, 20:], expected)


def test_models_that_cannot_be_run_layer_by_layer_are_refused() -> None:
    with pytest.raises(UserError, match="every layer must attend to all past"):
        Layers(tiny("Mistral", sliding_window=16), Full())
    with pytest.raises(UserError, match="no model of transformers"):
        Layers(torch.nn.Linear(2, 2), Full())


def test_recipes_with_decoders_are_checked() -> None:
    check(load_recipe("kangaroo"))
    with pytest.raises(UserError, match="is no decoder"):
        check(Recipe(name="wrong", decode="quantize.round.rtn"))
    with pytest.raises(UserError, match="changes nothing"):
        check(Recipe(name="empty"))


@pytest.fixture(scope="module")
def small(tiny: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """A Llama of 3 layers with large weights, and text for it."""
    return tiny(layers=3, blocks=200, initializer_range=0.2)


def run(small: tuple[Path, Path], out: Path, recipe: Recipe, budget: tuple[str, ...] = (), **more: object) -> dict:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))
    return compress(source, split, budget=budget, recipe=recipe, out=out, log=lambda _: None, **more)


@pytest.fixture(scope="module")
def made(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, run(small, out, Recipe(name="draft", search="search.allocate.uniform", decode=QUICK))


def test_the_weights_stay_and_the_adapter_is_counted(small: tuple[Path, Path], made: tuple[Path, dict]) -> None:
    out, certificate = made
    before, after = load_file(small[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = 2 * (4 * 32**2 + 2 * 32)
    assert certificate["bytes"] == certificate["bytes_original"] + adapter == artifact.bytes_of(out)
    assert certificate["quality"]["kl_mean"] < 1e-9
    artifact.verify_hashes(out)
    assert artifact.PLACED in certificate["files"]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["placed"] == [{"part": "kangaroo", "bytes": adapter, "by": QUICK}]
    assert any("parts for decoding learned over 6 steps" in note for note in plan["notes"])


def test_generate_uses_it_and_says_the_same(small: tuple[Path, Path], made: tuple[Path, dict]) -> None:
    out, _ = made
    talk = api.open_talk(out)
    assert talk.decoder == Kangaroo(tap=1, steps=6, eta=0.05)
    prompt = "def main(argv):"
    texts = [
        "".join(api.generate(model, prompt, max_tokens=20, **more))
        for model, more in (
            (small[0], {}),
            (out, {}),
            (out, {"decoder": "decode.sample.ancestral"}),
            (out, {"decoder": "decode.draft.kangaroo(tap=1, most=2)"}),
            (out, {"cache": "cache.store.full"}),
        )
    ]
    assert len(set(texts)) == 1
    assert texts[0]
    # drawn from a seed, and quantized while it is drawn
    drawn = ["".join(api.generate(out, prompt, max_tokens=12, temperature=1.0, seed=3, cache="kivi:4")) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0]


def test_an_original_generates_with_a_cache(small: tuple[Path, Path]) -> None:
    for cache in ("kivi:2", "cache.store.kivi(bits=2, residual=32)", "full"):
        assert "".join(api.generate(small[0], "import os", max_tokens=5, cache=cache))
    for cache, says in (
        ("kivy:2", "did you mean"),
        ("kivi:two", "behind the colon stand bits"),
        ("full:2", "no knob 'bits'"),
        ("kivi:9", "1 to 8"),
        ("quantize.round.rtn", "unknown cache"),
    ):
        with pytest.raises(UserError, match=says):
            next(api.generate(small[0], "import os", cache=cache))


def test_what_is_not_there_is_refused(small: tuple[Path, Path], made: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no parts .* --recipe kangaroo"):
        api.open_talk(small[0], decoder="decode.draft.kangaroo")
    with pytest.raises(UserError, match=r"holds no parts for kangaroo\(tap=2\)"):
        api.open_talk(made[0], decoder="decode.draft.kangaroo(tap=2)")
    with pytest.raises(UserError, match="is no decoder"):
        api.open_talk(small[0], decoder="cache.store.full")
    with pytest.raises(UserError, match="no layer to judge"):
        run(small, tmp_path / "deep", Recipe(name="deep", search="search.allocate.uniform", decode="decode.draft.kangaroo(tap=3)"))
    assert not (tmp_path / "deep").exists()


def test_transformers_reads_the_model_without_it(small: tuple[Path, Path], made: tuple[Path, dict]) -> None:
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain, ours = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (small[0], made[0]))
    torch.testing.assert_close(plain, ours)


def test_bench_says_what_the_drafts_are_worth(small: tuple[Path, Path], made: tuple[Path, dict]) -> None:
    found = api.bench(made[0], small[0], prompt=8, new=4, repeats=1, log=lambda _: None)
    assert found["drafted_same_as_plain"] == 1
    assert 0 <= found["drafts_accepted"] <= 1
    assert found["tokens_per_pass"] >= 1
    assert found["details"]["drafted_tokens_per_s"]["ratio"] > 0
    assert found["details"]["drafts_accepted"]["n"] > 0


def test_an_adapter_beside_fewer_bits_keeps_the_budget_and_a_cut_run_ends_as_a_calm_one(small: tuple[Path, Path], tmp_path: Path) -> None:
    choice = Choice(method="quantize.round.rtn", levels=({"bits": 4, "group": 16}, {"bits": 8, "group": 16}))
    recipe = Recipe(name="both", search="search.allocate.uniform", judge=False, choices=(choice,), decode=QUICK)
    calm = run(small, tmp_path / "calm", recipe, ("size=60%",))
    assert calm["bytes"] == artifact.bytes_of(tmp_path / "calm") <= 0.6 * 2 * open_model(small[0]).parameters
    with pytest.raises(UserError, match="below what recipe both can reach"):
        run(small, tmp_path / "low", recipe, ("size=31%",))

    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int, note: str) -> None:
        if stage == "tuning" and done == 3:
            raise Cut

    with pytest.raises(Cut):
        run(small, tmp_path / "out", recipe, ("size=60%",), progress=cut)
    assert run(small, tmp_path / "out", recipe, ("size=60%",))["files"] == calm["files"]
    assert "".join(laconic.generate(tmp_path / "out", "x = ", max_tokens=8)) == "".join(
        laconic.generate(tmp_path / "calm", "x = ", max_tokens=8, decoder="decode.sample.ancestral")
    )
