"""Coupled channels cut end to end: a language model and a convolutional network become smaller, are written and load everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from laconic import artifact
from laconic.claims.lab import Remembering
from laconic.core.errors import UserError
from laconic.core.site import Group, Site
from laconic.core.transform import Change, Cut
from laconic.cutting import groups_of, remove, share, stored_bytes, weigh
from laconic.data import open_data
from laconic.job import compress, plan
from laconic.models import open_model
from laconic.recipe import Cutting, Recipe, build, load_recipe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied Llama of 2 layers with 3 KV heads and nano's tokenizer, and text for it."""
    from laconic.zoo import corpus, nano

    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=24, intermediate_size=60, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:
            nn.init.normal_(p, 0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((nano.path() / name).read_bytes())
    blocks = "\n\n".join(text for _, text in corpus.named("search")).split("\n\n")
    (folder / "text.txt").write_text("\n\n".join(blocks[:200]), encoding="utf-8")
    return folder / "model", folder / "text.txt"


def opened(small: tuple[Path, Path]) -> tuple[Any, Any]:
    source = open_model(small[0])
    return source, open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))


def run(small: tuple[Path, Path], out: Path, recipe: Recipe, budget: str, **more: Any) -> dict[str, Any]:
    source, split = opened(small)
    return compress(source, split, budget=[budget], recipe=recipe, out=out, log=lambda _: None, **more)


def recipe(**cut: Any) -> Recipe:
    return Recipe(name="cut", cut={"method": "prune.cut.obspa"} | cut, judge=False)


def of(out: Path, name: str = "plan.json") -> dict[str, Any]:
    return json.loads((out / name).read_text())  # type: ignore[no-any-return]


TOKENS = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, inputs: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]


# ---- language models


def test_the_shipped_recipe_makes_tensors_smaller(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    certificate = run(small, out, load_recipe("obspa"), "size=93%")
    source = open_model(small[0])
    assert artifact.bytes_of(out) == certificate["bytes"] <= 0.93 * 2 * source.parameters
    assert certificate["reload"]["difference"] <= 1e-4
    made = of(out)
    # every tensor of the original is settled, and each that was cut says from what to what
    assert sorted(entry["tensor"] for entry in made["kept"]) == sorted(source.infos)
    why = {entry["tensor"]: entry["why"] for entry in made["kept"]}
    assert any(text.startswith("cut from 60 x 24 to ") for name, text in why.items() if "up_proj" in name)
    assert {entry["share"] for entry in made["cut"]["judged"]} == {"even", "ranked"}
    assert made["cut"]["share"] == min(made["cut"]["judged"], key=lambda entry: entry["kl"])["share"]
    assert {entry["why"] for entry in made["cut"]["left"]} == {"a table that is the head too reads them"}
    for group in made["cut"]["groups"]:
        assert group["channels"] - len(group["gone"]) == group["kept"] >= 1
    ours = logits(artifact.load(out))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.allclose(logits(theirs), ours, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) < sum(p.numel() for p in source.load(torch.float32).parameters())
    from laconic.page import render

    page = render(out).read_text()
    assert "Cut out" in page and "model.layers.1.mlp.gate_proj" in page
    # token by token with a cache
    assert theirs.generate(TOKENS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 24)


def test_layers_cut_alike_are_said_by_the_config(small: tuple[Path, Path], tmp_path: Path) -> None:
    run(small, tmp_path / "out", recipe(), "size=93%")
    config = of(tmp_path / "out", "config.json")
    assert config["intermediate_size"] < 60 and "shapes" not in config["quantization_config"]
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    # any transformers reads it: nothing is held in a form
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert plain.model.layers[0].mlp.up_proj.weight.shape == (config["intermediate_size"], 24)


def test_a_cut_model_is_quantized_like_any_other(small: tuple[Path, Path], tmp_path: Path) -> None:
    both = Recipe(
        name="both",
        cut={"method": "prune.cut.obspa", "keep": 0.93},
        choices=(
            {"method": "quantize.round.gptq", "levels": ({"bits": 8, "group": 32}, {"bits": 6, "group": 32}, {"bits": 5, "group": 32})},
        ),
    )
    certificate = run(small, tmp_path / "out", both, "bits=6")
    source = open_model(small[0])
    assert artifact.bytes_of(tmp_path / "out") == certificate["bytes"] <= 6 * source.parameters / 8
    made = of(tmp_path / "out")
    assert sum(len(group["gone"]) for group in made["cut"]["groups"])
    assert made["choices"]
    ours = logits(artifact.load(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(theirs), ours, atol=1e-4)


def test_all_kept_is_the_model_as_it_was(small: tuple[Path, Path], tmp_path: Path) -> None:
    certificate = run(small, tmp_path / "out", recipe(), "size=100%")
    assert certificate["bytes"] == certificate["bytes_original"]
    source = open_model(small[0])
    assert torch.allclose(logits(artifact.load(tmp_path / "out")), logits(source.load(torch.float32)), atol=1e-5)


def test_a_given_plan_is_followed_and_held_to_the_model(small: tuple[Path, Path], tmp_path: Path) -> None:
    source, split = opened(small)
    chosen = recipe(where=".*mlp.*", inputs="noise")
    made = plan(source, split, chosen, ["size=95%"], tmp_path / "plan.json", log=lambda _: None)
    assert [group["group"] for group in made["cut"]["groups"]] == [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    assert made["predicted"]["bytes"] <= 0.95 * 2 * source.parameters
    first = run(small, tmp_path / "a", chosen, "size=95%")
    second = run(small, tmp_path / "b", chosen, "size=95%", plan=made)
    assert first["files"]["model.safetensors"] == second["files"]["model.safetensors"]
    edited = json.loads(json.dumps(made))
    edited["cut"]["groups"][0]["gone"] = [*range(50)]
    certificate = run(small, tmp_path / "c", chosen, "size=95%", plan=edited)
    assert artifact.load(tmp_path / "c").model.layers[0].mlp.down_proj.weight.shape == (24, 10)
    assert certificate["bytes"] < first["bytes"]
    edited["cut"]["groups"][0]["gone"] = [60]
    with pytest.raises(UserError, match="which has 60"):
        run(small, tmp_path / "d", chosen, "size=95%", plan=edited)
    edited["cut"]["groups"][0]["group"] = "model.layers.9.mlp.gate_proj"
    with pytest.raises(UserError, match="no group of this model"):
        run(small, tmp_path / "d", chosen, "size=95%", plan=edited)


def test_mistakes_are_one_sentence(small: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the least is"):
        run(small, tmp_path / "out", recipe(), "size=20%")
    with pytest.raises(UserError, match="finds no channels that can be cut"):
        run(small, tmp_path / "out", recipe(where="nothing"), "size=90%")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.laconic").exists()
    (tmp_path / "bad.yaml").write_text("cut: {method: quantize.round.rtn}")
    with pytest.raises(UserError, match="cuts no channels"):
        load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("says: nothing at all")
    with pytest.raises(UserError, match="changes nothing"):
        load_recipe(str(tmp_path / "bad.yaml"))


class Stopped(Exception):
    pass


def test_a_stopped_cut_goes_on_and_ends_the_same(small: tuple[Path, Path], tmp_path: Path) -> None:
    whole = run(small, tmp_path / "whole", load_recipe("obspa"), "size=93%")
    seen: list[str] = []
    # stopped at every second new stage, again and again
    for _ in range(40):
        fresh = 0

        def progress(stage: str, done: int, total: int, note: str) -> None:
            nonlocal fresh
            if (line := f"{stage}|{done}|{note}") not in seen:
                seen.append(line)
                fresh += 1
                if fresh == 3:
                    raise Stopped

        try:
            again = run(small, tmp_path / "again", load_recipe("obspa"), "size=93%", progress=progress)
            break
        except Stopped:
            continue
    assert again["files"] == whole["files"]
    assert len(seen) > 6


# ---- any module

NET = '''
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    """A stem, a residual stream with a shortcut, a depthwise convolution, a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.point(F.relu(self.deep(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

def net():
    torch.manual_seed(0)
    model = Net()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2); m.running_var.uniform_(0.5, 2); nn.init.uniform_(m.weight, 0.5, 1.5)
    return model.eval()

class Rigid(Net):
    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        # a width written into the forward
        y = y.reshape(y.shape[0], 10, 8, 8)
        x = F.relu(x + self.bn2(self.conv2(y)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.point(F.relu(self.deep(x)))), 2).flatten(1))

def rigid():
    torch.manual_seed(0)
    return Rigid().eval()

def images():
    g = torch.Generator().manual_seed(5)
    return torch.randn(200, 3, 8, 8, generator=g), torch.randint(0, 5, (200,), generator=g)
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "cutnets.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cutnets", None)
    yield
    sys.modules.pop("cutnets", None)


def network(name: str) -> tuple[Any, Any]:
    source = open_model(f"cutnets:{name}")
    split = open_data("cutnets:images", source, seed=0)
    source.trace(split.calibrate.inputs[:1])
    return source, split


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("method", "inputs"),
    [("prune.cut.obspa", "data"), ("prune.cut.obspa", "noise"), ("prune.cut.spa(score=prune.score.wanda, over='mean')", "data")],
)
def test_a_convolutional_network_is_cut_and_loads(tmp_path: Path, method: str, inputs: str) -> None:
    source, split = network("net")
    out = tmp_path / "out"
    certificate = compress(source, split, budget=["size=60%"], recipe=recipe(method=method, inputs=inputs), out=out, log=lambda _: None)
    assert certificate["bytes"] <= 0.6 * certificate["bytes_original"]
    groups = {group["group"]: group for group in of(out)["cut"]["groups"]}
    # the stream with the depthwise convolution, the inner channels, the flattened ones
    assert {name: group["channels"] for name, group in groups.items()} == {"stem": 12, "conv1": 10, "point": 8}
    model = artifact.load(out)
    left = groups["stem"]["kept"]
    assert left < 12
    assert model.stem.weight.shape[0] == model.deep.weight.shape[0] == model.deep.groups == model.bn2.running_var.shape[0] == left
    assert model.head.weight.shape[1] == 4 * groups["point"]["kept"]
    assert torch.isfinite(logits(model, split.certify.inputs[:3])).all()
    # an artifact of a cut model measures as it was certified
    from laconic.job import quality_of

    written = artifact.stream(out)
    written.trace(split.calibrate.inputs[:1])
    again = quality_of(source, written, split.certify, metric=split.metric, batch=64)
    assert again["kl_mean"] == pytest.approx(certificate["quality"]["kl_mean"], rel=1e-3)


@pytest.mark.usefixtures("nets")
def test_what_is_removed_computes_what_is_masked() -> None:
    """A network cut without making up for anything is the network with zeros in place of what reads the channels."""
    source, split = network("net")
    cutting = Cutting(method="prune.cut.spa(score=prune.score.magnitude)", norms=False)
    found, left = groups_of(source, cutting)
    assert set(left) == {"stem (its inputs)", "head"}
    gone = {one.name: [0, 3, 5] for one in found}
    x = split.certify.inputs[:8]
    reduced = remove(
        source, x, cutting, build(cutting.method), found, gone, batch=4, prefix="cut", work=Remembering(), progress=lambda *_: None
    )
    masked = source.load(torch.float32)
    for one in found:
        for member in one.group.members:
            if member.reads:
                masked.get_submodule(member.site.name).weight.data.index_fill_(1, torch.tensor(member.slices(gone[one.name])), 0.0)
    assert torch.allclose(logits(reduced.load(torch.float32), x), logits(masked, x), atol=1e-5)
    assert (
        stored_bytes(source, reduced.shapes)
        == sum(2 * v.numel() for v in reduced.load(torch.float32).state_dict().values() if v.dim()) + 24
    )
    # the sites of what is left are those of a smaller model
    assert next(s for s in reduced.anatomy.sites() if s.name == "conv1").shape == (7, 9, 3, 3)


class Astray(Cut):
    """Slices of a group at unlike indices: what reads them loses the channels beside those that its writers lose."""

    def sites(self, group: Group) -> tuple[Site, ...]:
        return ()

    def worth(self, group: Group, weights: Any, stats: Any) -> Tensor:
        return torch.zeros(group.width)

    def __call__(self, group: Group, weights: Any, stats: Any, kept: tuple[int, ...]) -> Change:
        beside = tuple(sorted((i + 1) % group.width for i in kept))
        return Change(cut=((group, kept),), fold=build("prune.cut.spa(score=prune.score.magnitude)")(group, weights, {}, beside).fold)


@pytest.mark.usefixtures("nets")
def test_a_cut_at_unlike_indices_is_found_out() -> None:
    source, split = network("net")
    cutting = Cutting(method="prune.cut.obspa")
    found, _ = groups_of(source, cutting)
    with pytest.raises(ValueError, match="computes something else"):
        remove(
            source, split.calibrate.inputs[:8], cutting, Astray(), found, {"conv1": [0, 1, 5]},
            batch=8, prefix="cut", work=Remembering(), progress=lambda *_: None,
        )  # fmt: skip


@pytest.mark.usefixtures("nets")
def test_a_width_that_the_forward_fixes_is_left_by_name() -> None:
    source, split = network("rigid")
    cutting = Cutting(method="prune.cut.obspa")
    weighed = weigh(
        source, split.calibrate.inputs[:16], cutting, build(cutting.method), batch=8, work=Remembering(), progress=lambda *_: None
    )  # fmt: skip
    assert {one.name for one in weighed.groups} == {"stem", "point"}
    assert weighed.left["conv1"] == "the module does not run without some of them (RuntimeError)"


def test_no_matrix_loses_all_of_its_channels() -> None:
    """Two branches side by side in one group, all of the least worth in one of them."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.read = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 12)
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.a(x), self.b(x)], -1)
            return self.head(F.relu(self.read(x) + x))

    torch.manual_seed(0)
    module = Beside()
    module.a.weight.data *= 1e-3
    module.head.weight.data[:, :6] *= 1e-3
    source = open_model(module)
    source.trace(torch.randn(2, 4))
    cutting = Cutting(method="prune.cut.spa(score=prune.score.magnitude)")
    method, x = build(cutting.method), torch.randn(16, 4)
    weighed = weigh(source, x, cutting, method, batch=8, work=Remembering(), progress=lambda *_: None)
    (one,) = weighed.groups
    assert one.group.width == 12
    for even in (True, False):
        gone = share(source, weighed, int(0.2 * stored_bytes(source, {})), even=even)
        reduced = remove(
            source, x, cutting, method, weighed.groups, gone, batch=8, prefix="cut", work=Remembering(), progress=lambda *_: None
        )
        model = reduced.load(torch.float32)
        assert len(model.a.weight) >= 1 and len(model.b.weight) >= 1
        assert logits(model, x).shape == (16, 2)


@pytest.mark.usefixtures("nets")
def test_running_statistics_move_with_the_cut() -> None:
    """With all kept nothing moves; with the statistics of the data in place, a cut network's norms see mean and variance again."""
    source, split = network("net")
    x = split.calibrate.inputs[:64]
    cutting = Cutting(method="prune.cut.obspa")
    found, _ = groups_of(source, cutting)
    same = remove(
        source, x, cutting, build(cutting.method), found, {}, batch=32, prefix="cut", work=Remembering(), progress=lambda *_: None
    )
    for name, value in source.load(torch.float32).state_dict().items():
        assert torch.allclose(same.load(torch.float32).state_dict()[name].float(), value.float(), atol=1e-5), name
    moved = remove(
        source,
        x,
        cutting,
        build(cutting.method),
        found,
        {"conv1": [1, 2, 3]},
        batch=32,
        prefix="cut",
        work=Remembering(),
        progress=lambda *_: None,
    )
    a, b = source.load(torch.float32), moved.load(torch.float32)
    assert torch.allclose(a.bn0.running_mean, b.bn0.running_mean, atol=1e-5)
    assert not torch.allclose(a.bn2.running_mean, b.bn2.running_mean, atol=1e-4)
    assert (b.bn2.running_var > 0).all()


def test_real_resnet20_is_halved(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_DATA", str(shared))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("cifar", None)
    source = open_model("cifar:resnet20")
    split = open_data("cifar:train", source, seed=0, certify="cifar:test")
    source.trace(split.calibrate.inputs[:1])
    certificate = compress(source, split, budget=["size=70%"], recipe=recipe(), out=tmp_path / "out", log=lambda _: None)
    assert certificate["bytes"] <= 0.7 * certificate["bytes_original"]
    assert certificate["quality"]["top1_agreement"] >= 0.8
    # the stream ends in shortcuts that pad by a number of channels written into the forward
    assert "conv1" in {entry["group"] for entry in of(tmp_path / "out")["cut"]["left"]}
    assert F.relu(logits(artifact.load(tmp_path / "out"), split.certify.inputs[:2])).shape == (2, 10)
