"""A small vision transformer through compress by ShiftAddViT: what is planned, what is held, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from laconic import artifact
from laconic.core.errors import UserError
from laconic.core.packed import Held
from laconic.data import Samples, Split
from laconic.job import compress
from laconic.measurement import outputs, routed
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.mix.shiftaddvit import Attention, Mixture
from laconic.models import ModuleSource
from laconic.recipe import Recipe, check, load_recipe
from laconic.zoo import small, vit

HELD = ("q_proj", "k_proj", "v_proj", "o_proj")


def blank() -> nn.Module:
    """As the factory returns it, with weights that were drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = vit.blank()
    model.example_input = torch.zeros(2, 1, vit.SIZE, vit.SIZE)  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleSource, Split, Path, list[str]]:
    torch.manual_seed(0)
    model = blank()
    source, lines = ModuleSource("test_vit:blank", model), []
    x = torch.randn(48, 1, vit.SIZE, vit.SIZE)
    y = outputs(model)(x).argmax(1)
    parts = [Samples(x[i : i + 16], y[i : i + 16], 1, 16, "") for i in (0, 16, 32)]
    recipe = Recipe(
        name="own", search="search.allocate.uniform", judge=False, route="quantize.mix.shiftaddvit(steps=4, batch=8, scaled=True)"
    )
    check(recipe)
    split, out = Split(*parts, {"kind": "pairs"}, "accuracy"), tmp_path_factory.mktemp("vit") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        compress(source, split, budget=[], recipe=recipe, out=out, log=lines.append)
    return source, split, out, lines


def test_bytes_are_those_that_were_planned(made: tuple[ModuleSource, Split, Path, list[str]]) -> None:
    _, _, out, _ = made
    certificate, plan = (json.loads((out / name).read_text()) for name in ("certificate.json", "plan.json"))
    assert certificate["bytes"] == artifact.bytes_of(out) == plan["predicted"]["bytes"]
    # 5 bits a weight, a power for each row and the table
    sizes = {entry["tensor"]: entry for entry in plan["kept"]}
    for layer in range(vit.LAYERS):
        for name in HELD:
            entry = sizes[f"vit.layers.{layer}.attention.{name}.weight"]
            assert entry["bytes"] == 64 * 40 + 64 + 64 and entry["before"] == 2 * 64 * 64
            assert entry["why"] == "learned, and held in a form of the routed part"
        assert sizes[f"vit.layers.{layer}.mlp.fc1.weight"]["why"] == "learned in the same bytes"
    placed = {entry["part"]: entry["bytes"] for entry in plan["placed"]}
    assert placed["vit.layers.0.attention"] == 2 * 64 * 9
    assert placed["vit.layers.0.mlp"] == (128 * 40 + 128 + 64 * 80 + 64) + 2 * (128 + 64) + 2 * 2 * 64
    assert certificate["reload"]["difference"] <= 1e-4


def test_it_is_read_back_and_runs_without_most_multiplications(made: tuple[ModuleSource, Split, Path, list[str]]) -> None:
    _, split, out, _ = made
    certificate = json.loads((out / "certificate.json").read_text())
    load = certificate["multiplications"]
    assert load["expected"] < load["worst"] < load["dense"]
    model = artifact.load(out)
    kinds = [type(part) for part in routed(model)]
    assert kinds.count(Attention) == kinds.count(Mixture) == vit.LAYERS
    held = [path for path, layer in model.named_modules() if isinstance(layer, Held)]
    assert len(held) == vit.LAYERS * 6 and all(isinstance(model.get_submodule(path).weight, Leveled) for path in held)
    x = split.certify.inputs
    with torch.no_grad():
        whole = outputs(model)(x)
        alone = torch.cat([outputs(model)(one[None]) for one in x])
    torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-4)
    assert whole.isfinite().all()


def test_the_recipe_names_the_method() -> None:
    assert load_recipe("shiftaddvit").route == "quantize.mix.shiftaddvit"


def digits(folder: Path) -> Path:
    """A file of a few random images, as MNIST's is laid out."""
    rng = np.random.default_rng(0)
    parts = {f"{part}_x": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for part, count in (("train", 64), ("test", 500))}
    np.savez(folder / "mnist.npz", **parts, **{f"{part}_y": rng.integers(0, 10, len(parts[f"{part}_x"])) for part in ("train", "test")})
    return folder


def test_training_writes_what_the_factory_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    vit.main(["--data", str(digits(tmp_path)), "--minutes", "0.005", "--out", str(out), "--scratch", str(scratch)])
    record = json.loads((out / "training.json").read_text())
    assert record["run"]["steps"] >= 1 and 0 <= record["right"]["test"] <= 1
    assert f"{record['parameters']:,} parameters" in (out / "README.md").read_text()
    monkeypatch.setattr(vit, "path", lambda: out)
    model = vit.vit()
    assert outputs(model)(model.example_input).shape == (2, vit.CLASSES)
    monkeypatch.setattr(vit, "path", lambda: tmp_path)
    with pytest.raises(UserError, match="is missing: train it with"):
        vit.vit()
    with pytest.raises(UserError, match=r"give the folder of mnist\.npz"):
        vit.main(["--data", str(scratch), "--out", str(out), "--scratch", str(scratch)])


def test_moved_images_are_the_same_elsewhere() -> None:
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 14, 14] = 200
    found = vit.moved(images, torch.Generator().manual_seed(0))
    at = found.flatten(1).argmax(1)
    assert (found.flatten(1).amax(1) == 200).all()
    assert set((at // 28).tolist()) == set((at % 28).tolist()) == {12, 13, 14, 15, 16}


def test_the_shipped_model_reads_digits(shared: Path) -> None:
    (_, _), (images, classes) = small.mnist(shared / "mnist")
    assert vit.right(vit.vit(), images[:1000], classes[:1000]) > 0.94
