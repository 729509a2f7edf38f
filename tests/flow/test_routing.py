"""Routing through the whole job: a language model whose feed-forward layers run in parts, a network whose filters run where they fire, what
the folders hold, who reads them, what is counted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import laconic
from laconic import api, artifact
from laconic.core.errors import UserError
from laconic.core.router import Routed, asking
from laconic.data import open_data
from laconic.job import compress
from laconic.measurement import routed
from laconic.models import open_model
from laconic.recipe import Choice, Recipe, build, check, load_recipe
from laconic.routing import begin, install, parts_of

EXPERTS = "route.gate.factorllm(steps=6, batch=2)"
FILTERS = "route.gate.ftwt(steps=6, batch=8, mass=0.8)"


def recipe(route: str) -> Recipe:
    made = Recipe(name="own", search="search.allocate.uniform", judge=False, route=route)
    check(made)
    return made


def run(small, out: Path, **more):
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))
    return compress(source, split, budget=[], recipe=recipe(EXPERTS), out=out, log=lambda _: None, **more)


@pytest.fixture(scope="module")
def out(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routed") / "out"
    run(small, folder)
    return folder


def test_the_folder_holds_routers_beside_all_that_was_there(small, out):
    source = open_model(small[0])
    certificate, plan = (json.loads((out / name).read_text()) for name in ("certificate.json", "plan.json"))
    stored = artifact.stream(out).stored
    own = {f"model.layers.{i}.mlp.router" for i in range(3)}
    assert set(stored) == set(source.infos) | own
    # 4 experts of 32 channels in bf16, in each of 3 layers
    added = 3 * 2 * 4 * 32
    assert [entry["bytes"] for entry in plan["placed"]] == [2 * 4 * 32] * 3
    assert certificate["bytes"] == artifact.bytes_of(out) == plan["predicted"]["bytes"] == 2 * source.parameters + added
    assert certificate["reload"]["difference"] <= 1e-5
    learned = {entry["tensor"] for entry in plan["kept"] if entry["why"] == "learned in the same bytes"}
    assert learned == {name for name in source.infos if ".mlp." in name}
    # of the feed-forward layers half of the weights, and the routers
    feed, heads = 3 * 3 * 72 * 32, 3 * 4 * 32
    found = certificate["multiplications"]
    assert found["dense"] - found["expected"] == feed / 2 - heads
    assert found["expected"] == found["worst"] == plan["routed"]["expected"] == plan["routed"]["worst"]
    assert found["unit"] == "multiplications/token"
    # what is not routed has not moved; what is has learned
    for name in source.infos:
        same = torch.equal(artifact.stream(out).read(name), source.read(name))
        assert same == (".mlp." not in name), name
    artifact.verify_hashes(out)


def test_all_who_read_it_compute_the_same(small, out, tmp_path):
    tokens = torch.randint(3, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = laconic.load(out)
        said = ours(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(theirs(tokens).logits, said, rtol=1e-5, atol=1e-5)
        for part in routed(theirs):
            part.run = "masked"
        torch.testing.assert_close(theirs(tokens).logits, said, rtol=1e-5, atol=1e-5)
        # with a cache, token by token
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(ours.generate(tokens, **settings), theirs.generate(tokens, **settings))
        # saved by transformers and read once more
        theirs.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        torch.testing.assert_close(again(tokens).logits, said, rtol=1e-5, atol=1e-5)
        assert len(routed(again)) == 3
        # in bf16, thawed or not
        assert torch.isfinite(laconic.load(out, dtype=torch.bfloat16, thaw=True)(tokens).logits).all()


def test_the_same_again_and_after_a_stop(small, out, tmp_path, monkeypatch):
    from laconic import pipeline

    real = pipeline.learn_routed

    def stopped(*args, **more):
        real(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "learn_routed", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "out")
    monkeypatch.setattr(pipeline, "learn_routed", real)
    run(small, tmp_path / "out")
    hashes = [json.loads((folder / "certificate.json").read_text())["files"] for folder in (out, tmp_path / "out")]
    assert hashes[0] == hashes[1]


def test_the_commands_know_it(small, out, tmp_path):
    found = api.measure(out, small[0], small[1], speed=False, log=lambda _: None)
    dense, expected = found["multiplications_original"], found["multiplications"]
    recorded = json.loads((out / "certificate.json").read_text())["multiplications"]
    assert (dense, expected, found["multiplications_worst"]) == (recorded["dense"], recorded["expected"], recorded["worst"])
    assert found["details"]["multiplications"]["unit"] == "multiplications/token"
    page = api.report(out, extras=False, log=lambda _: None)
    assert "Multiplications" in page.read_text(encoding="utf-8")
    talk = api.open_talk(out)
    drawn = api.tokens(talk, torch.tensor([[5, 6, 7]]), limit=4, temperature=0.0, generator=torch.Generator())
    assert len(list(drawn)) <= 4


def test_what_cannot_be_is_said(small, tmp_path):
    source = open_model(small[0])
    with pytest.raises(UserError, match="experts=5 do not divide the 72 hidden neurons"):
        parts_of(source, build("route.gate.factorllm(experts=5)"), source.skeleton())
    with pytest.raises(UserError, match="FTWT finds nothing to route"):
        parts_of(source, build("route.gate.ftwt"), source.skeleton())
    with pytest.raises(UserError, match="rtn is no router; try route"):
        recipe("quantize.round.rtn")
    with pytest.raises(UserError, match="`route` beside `choices` is not there yet"):
        check(Recipe(name="both", route=EXPERTS, choices=(Choice(method="quantize.round.rtn", levels=({"bits": 8, "group": 16},)),)))
    with pytest.raises(UserError, match="changes nothing"):
        check(Recipe(name="none"))


@pytest.mark.parametrize("name", ["factorllm", "ftwt"])
def test_the_shipped_recipes_route_and_nothing_else(name):
    shipped = load_recipe(name)
    assert shipped.route is not None
    assert not shipped.choices
    # recipes without a router are written as before
    assert "route" not in load_recipe("auto").resolved()


# ---- other architectures


def other(kind: str, folder: Path, **knobs):
    torch.manual_seed(0)
    plain = {
        "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**plain, **knobs})).save_pretrained(folder)
    return open_model(folder)


@pytest.mark.parametrize(
    ("kind", "knobs"), [("Gemma", {"head_dim": 8}), ("Qwen3", {"head_dim": 8}), ("Phi3", {}), ("GPTNeoX", {}), ("Phi", {})]
)
def test_experts_of_other_decoders(kind, knobs, tmp_path):
    """Fused gate and up, no gate at all, biases: what is run is the layer's own forward over its slices."""
    source = other(kind, tmp_path, **knobs)
    before, model = source.load(torch.float32), source.load(torch.float32)
    parts, notes = parts_of(source, build("route.gate.factorllm"), model)
    assert len(parts) == 2
    assert not notes
    install(model, parts)
    begin(parts, 0)
    tokens = torch.randint(1, 31, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = model(tokens).logits
        with asking(parts.values(), "masked", "router"):
            torch.testing.assert_close(model(tokens).logits, said, rtol=1e-5, atol=1e-5)
        for part in parts.values():
            part.active, part.scale = part.experts, 1.0
        torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "knobs"), [("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}), ("Mixtral", {"num_local_experts": 2})])
def test_what_cannot_be_run_in_parts_is_left(kind, knobs, tmp_path):
    """GPT-2 has a width written into its linears; a mixture has experts already."""
    source = other(kind, tmp_path, **knobs)
    with pytest.raises(UserError, match="FactorLLM finds nothing to route"):
        parts_of(source, build("route.gate.factorllm"), source.skeleton())


# ---- a network of convolutions


class Blocks(nn.Module):
    """Two residual blocks; classes depend on the image's colours."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()
        return self.linear(x.mean((2, 3)))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(120, 3, 8, 8, generator=g), torch.randint(0, 4, (120,), generator=g)


def test_filters_through_the_whole_job(tmp_path):
    spec, data = "tests.flow.test_routing:blocks", "tests.flow.test_routing:images"
    result = api.compress(spec, data, recipe=recipe(FILTERS), out=tmp_path / "out", log=lambda _: None)
    certificate, plan = result.certificate, json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [entry["part"] for entry in plan["placed"]] == ["stem", "conv1", "conv2"]
    # a head is outputs times inputs, and an offset for each output
    assert [entry["bytes"] for entry in plan["placed"]] == [2 * (3 * 8 + 8), 2 * (64 + 8), 2 * (64 + 8)]
    found, said = certificate["multiplications"], plan["routed"]
    pixels, heads = 64, 24 + 64 + 64
    assert found["dense"] == said["dense"] == pixels * 9 * (24 + 64 + 64) + 32
    assert found["worst"] == found["dense"] + heads
    assert 0 < found["expected"] <= found["worst"]
    assert 0 < said["expected"] < said["dense"]
    assert found["unit"] == "multiplications/image"
    model = laconic.load(tmp_path / "out")
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Routed)}
    # only what stands before a rectifier is rectified
    assert {name: part.rectified for name, part in parts.items()} == {"stem": True, "conv1": True, "conv2": False}
    x = images()[0][:16]
    with torch.no_grad():
        gathered = model(x)
        for part in parts.values():
            part.run = "masked"
        torch.testing.assert_close(model(x), gathered, rtol=1e-5, atol=1e-5)
    # norms have seen the calibration images
    assert not torch.equal(model.bn1.running_mean, blocks().bn1.running_mean)
    checked = api.verify(tmp_path / "out")
    assert checked["ok"]
    assert "multiplications" in checked["compared"]


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(60, 3, 32, 32, generator=g), torch.randint(0, 4, (60,), generator=g)


def test_a_class_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4, downsample_in_first_stage=False
    )
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    data = "tests.flow.test_routing:pictures"
    result = api.compress(str(tmp_path / "model"), data, recipe=recipe(FILTERS), out=tmp_path / "out", log=lambda _: None)
    assert result.certificate["multiplications"]["expected"] < result.certificate["multiplications"]["worst"]
    x = pictures()[0][:8]
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        said = laconic.load(tmp_path / "out")(x).logits
        torch.testing.assert_close(theirs(x).logits, said, rtol=1e-4, atol=1e-5)
    assert len(routed(theirs)) == len(json.loads((tmp_path / "out" / "plan.json").read_text())["placed"]) > 3
    assert api.verify(tmp_path / "out")["ok"]
    found = api.measure(tmp_path / "out", speed=False, log=lambda _: None)
    assert found["multiplications"] == pytest.approx(result.certificate["multiplications"]["expected"], rel=1e-3)


def test_what_is_too_large_is_refused_before_work(small, monkeypatch, tmp_path):
    from laconic import pipeline

    monkeypatch.setattr(pipeline, "TUNABLE", 1000)
    with pytest.raises(UserError, match="is for 1,000 weights at most"):
        api.plan(str(small[0]), str(small[1]), recipe=recipe(EXPERTS), log=lambda _: None)


@pytest.mark.long
def test_the_real_resnet(shared, tmp_path):
    """Pretrained weights and images: what was written is read back, and its filters are chosen by the image."""
    data = "tests.flow.cifar"
    result = api.compress(
        f"{data}:resnet20", f"{data}:test", recipe=recipe("route.gate.ftwt(mass=0.95, steps=8, rate=0.001)"), out=tmp_path / "out",
        log=lambda _: None,
    )  # fmt: skip
    load = result.certificate["multiplications"]
    # 432 x 1024, 6 x 2304 x 1024, 4608 x 256, 5 x 9216 x 256, 18432 x 64 and 5 x 36864 x 64 of convolutions, and 640 of the classes
    assert load["dense"] == 40_550_400 + 640
    assert 0.5 < load["expected"] / load["dense"] <= load["worst"] / load["dense"] < 1.001
    assert result.certificate["quality"]["accuracy"] > 0.5
    assert len(routed(laconic.load(tmp_path / "out"))) == 19
