"""All is computed on the device that is asked for: on one that shares nothing with the processor a job runs, and comes to the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress
from laconic.kernels.place import device, here, on
from laconic.models import open_model
from laconic.recipe import load_recipe, named
from laconic.zoo import mamba
from tests import twin

RECIPES = {"gptq": "bits=6", "auto": "bits=6"}
MORE = {
    "auto": "bits=6", "awq": "bits=6", "bitstack": "size=90%", "evopress": "bits=6", "factorllm": "size=100%", "finercut": "size=90%",
    "flexround": "bits=6", "llm-fp4": "bits=6", "lloyd": "bits=6", "mxfp4": "bits=6", "obspa": "size=90%", "vptq": "bits=6",
    "w8a8": "bits=15",
}  # fmt: skip

NET = """
import torch
from laconic.claims.lab import ResNet

def make():
    torch.manual_seed(1)
    return ResNet().eval()

def data():
    g = torch.Generator().manual_seed(0)
    for _ in range(12):
        yield torch.randn(16, 3, 32, 32, generator=g), torch.randint(0, 10, (16,), generator=g)

data.metric = "accuracy"
"""


@pytest.fixture(scope="module")
def other() -> str:
    return twin.started()


def run(small: tuple[Path | str, Path | str], out: Path, recipe: str, where: str, budget: str = "bits=6") -> dict[str, Any]:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))
    if source.traced:
        source.trace(split.calibrate.inputs[:1], split.given)
    return compress(source, split, budget=[budget], recipe=load_recipe(recipe), out=out, device=where, log=lambda _: None)


def test_tensors_are_made_where_they_are_asked_for(other: str) -> None:
    assert device().type == "cpu"
    with on(other):
        made = torch.zeros(3)
        assert made.device.type == other
        assert torch.zeros(3, device="cpu").device.type == "cpu"
        assert (made + here(torch.ones(3))).sum() == 3
        with pytest.raises(RuntimeError, match="two devices"):
            made + torch.ones(3, device="cpu")
        with on("cpu"):
            assert torch.zeros(3).device.type == device().type == "cpu"
        assert torch.zeros(3).device.type == other
    assert torch.zeros(3).device.type == device().type == "cpu"


def test_a_seed_draws_the_same_on_every_device(other: str) -> None:
    def drawn() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        odds = torch.arange(1.0, 6.0)
        filled = torch.zeros(4).normal_(generator=g)
        return [torch.rand(3, generator=g), torch.randperm(5, generator=g), torch.multinomial(odds, 2, generator=g), filled]

    plain = drawn()
    with on(other):
        there = drawn()
    assert all(one.device.type == other for one in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(plain, there, strict=True))


def test_a_device_that_is_not_there_is_refused(small: tuple[Path, Path], tmp_path: Path) -> None:
    from laconic import api

    for name in ("tpu", "meta", "mps", "cuda" if not torch.cuda.is_available() else "cuda:99"):
        with pytest.raises(UserError, match="use cpu"):
            api.compress(small[0], small[1], budget="bits=6", out=tmp_path / "out", device=name)


def elsewhere(small: tuple[Path | str, Path | str], out: Path, recipe: str, budget: str) -> dict[str, Any]:
    """The quality of a job on the other device, in a process of its own: autograd counts the devices when it is first used."""
    command = [sys.executable, __file__, *map(str, small), str(out), recipe, budget]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_rounding_comes_to_the_same_bytes_elsewhere(small: tuple[Path, Path], tmp_path: Path) -> None:
    here, there = run(small, tmp_path / "cpu", "rtn", "cpu"), elsewhere(small, tmp_path / "there", "rtn", "bits=6")
    assert here["files"]["model.safetensors"] == there["files"]["model.safetensors"]
    assert here["quality"]["kl_mean"] == pytest.approx(there["quality"]["kl_mean"], rel=1e-4)


def same(small: tuple[Path | str, Path | str], out: Path, recipe: str, budget: str) -> None:
    """The processor has kernels of its own, which add up in another order: what comes out is as good, not the same to the last bit."""
    here, there = run(small, out / "cpu", recipe, "cpu", budget)["quality"], elsewhere(small, out / "there", recipe, budget)["quality"]
    assert here["bytes"] == pytest.approx(there["bytes"], rel=0.01)
    assert here["kl_mean"] == pytest.approx(there["kl_mean"], rel=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_job_runs_elsewhere(small: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    # of tuning a few steps and of levels the first and the last: the whole of it is in the long suite
    content = yaml.safe_load(named()[recipe].read_text(encoding="utf-8"))
    for choice in content["choices"]:
        choice["levels"] = [choice["levels"][0], choice["levels"][-1]]
    if "tune" in content:
        content["tune"] += "(steps=8)"
    (tmp_path / f"{recipe}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    same(small, tmp_path, str(tmp_path / f"{recipe}.yaml"), RECIPES[recipe])


@pytest.mark.long
@pytest.mark.parametrize("recipe", MORE)
def test_every_kind_of_recipe_runs_elsewhere(small: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    same(small, tmp_path, recipe, MORE[recipe])


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["auto", "obspa", "adaround", "ftwt"])
def test_a_traced_network_runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    (tmp_path / "net_of_test.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    same(("net_of_test:make", "net_of_test:data"), tmp_path, recipe, {"ftwt": "size=100%", "obspa": "size=80%"}.get(recipe, "bits=5"))


@pytest.mark.long
def test_a_mamba_runs_elsewhere(small: tuple[Path, Path], tmp_path: Path) -> None:
    same((mamba.path(), small[1]), tmp_path, "mambaquant", "bits=8.25")


if __name__ == "__main__":
    model, text, folder, name, asked = sys.argv[1:]
    done = run((model, text), Path(folder), name, twin.started(), asked)
    print(json.dumps({"quality": done["quality"], "files": done["files"]}))
