"""CBQ through the whole job: windows of blocks, inputs in 4 bits with steps that learn, loud channels made quieter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import laconic
from laconic import artifact
from laconic.core.transform import Window
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import build, check, load_recipe


def short(name: str):
    recipe = load_recipe(name)
    return recipe.model_copy(update={"tune": recipe.tune.replace("steps=200", "steps=4")})


@pytest.mark.parametrize("name", ["cbq", "cbq-w4a4"])
def test_the_whole_job(small: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 4))
    budget = ["bits=4.6"] if name == "cbq" else []
    said: list[str] = []
    certificate = compress(source, split, budget=budget, recipe=short(name), out=tmp_path / "out", log=said.append)
    assert certificate["bytes"] == artifact.bytes_of(tmp_path / "out")
    assert certificate["reload"]["difference"] <= 1e-4
    artifact.verify_hashes(tmp_path / "out")
    assert bool(torch.isfinite(laconic.load(tmp_path / "out")(torch.arange(12)[None]).logits).all())
    tensors = {key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()}
    shares = [value for key, value in tensors.items() if key.endswith(".share")]
    assert bool(shares) == (name == "cbq-w4a4")
    # the steps of inputs have learned, whichever block they are of
    assert all(value.shape == (1,) and 0.5 < float(value) < 1.5 for value in shares)
    assert not shares or sum(float(value) != 1 for value in shares) > len(shares) / 2


@pytest.mark.parametrize("name", ["cbq", "cbq-w4a4"])
def test_the_shipped_recipes(name: str) -> None:
    loaded = load_recipe(name)
    check(loaded)
    assert build(loaded.tune).scope == Window(2, 1) and build(loaded.tune).targets == "both"
    assert loaded.chooses == (name == "cbq")
    assert name != "cbq" or loaded.choices == load_recipe("adaround").choices
