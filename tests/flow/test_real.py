"""The main job on real weights and real data; skipped where ../shared/data is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import Choice, Recipe, load_recipe


def one_scale_a_channel(bits: int) -> Recipe:
    """GPTQ, every matrix, one scale for each output channel."""
    return Recipe(
        name=f"w{bits}",
        search="search.allocate.uniform",
        judge=False,
        choices=({"method": "quantize.round.gptq(clip=True)", "levels": ({"bits": bits, "group": None},)},),
    )


@pytest.mark.parametrize(("bits", "least"), [(8, 0.992), (4, 0.97), (3, 0.93)])
def test_resnet20_agrees_with_itself(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, least: float) -> None:
    monkeypatch.setenv("LACONIC_DATA", str(shared))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("cifar", None)
    source = open_model("cifar:resnet20")
    split = open_data("cifar:train", source, seed=0, certify="cifar:test")
    source.trace(split.calibrate.inputs[:1])
    certificate = compress(source, split, budget=["size=100%"], recipe=one_scale_a_channel(bits), out=tmp_path / "out", log=lambda _: None)
    assert certificate["quality"]["top1_agreement"] >= least
    assert certificate["details"]["top1_agreement"]["n"] == 1000
    assert certificate["reload"]["difference"] < 1e-4


@pytest.mark.parametrize(
    "tune", ["flexround(rates=(('s2', 2e-2), ('s1', 3e-3)), decay='cosine',", "adaround(rates=(('v', 2e-1),), weigh=0.03,"]
)
def test_resnet20_learns_its_rounding_layer_by_layer(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str) -> None:
    monkeypatch.setenv("LACONIC_DATA", str(shared))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("cifar", None)
    source = open_model("cifar:resnet20")
    split = open_data("cifar:train", source, seed=0, certify="cifar:test", limits=(64, 64, 64))
    source.trace(split.calibrate.inputs[:1])
    learned = one_scale_a_channel(3).model_copy(update={
        "choices": (Choice(method="quantize.round.rtn(clip=True)", levels=({"bits": 3, "group": None},)),),
        "tune": f"quantize.round.{tune} steps=40, batch=16)",
    })  # fmt: skip
    compress(source, split, budget=["size=100%"], recipe=learned, out=tmp_path / "out", log=lambda _: None)
    judged = json.loads((tmp_path / "out" / "plan.json").read_text())["judged"]
    assert judged[1]["bytes"] == judged[0]["bytes"]
    assert judged[1]["kl"] < 0.8 * judged[0]["kl"]


def test_stories260k_gptq_beats_round_to_nearest(shared: Path, tmp_path: Path) -> None:
    source = open_model(shared / "stories260k")
    split = open_data(str(shared / "text" / "tinystories_1000.jsonl.gz"), source, seed=0, limits=(24, 8, 16))
    kl = {}
    for recipe in ("rtn", "gptq"):
        certificate = compress(source, split, budget=["bits=4.5"], recipe=load_recipe(recipe), out=tmp_path / recipe, log=lambda _: None)
        kl[recipe] = certificate["quality"]["kl_mean"]
        assert certificate["bits_per_weight"] <= 4.5
    assert sum(split.record["parts"][part]["documents"] for part in ("calibrate", "search", "certify")) == 1000
    assert kl["gptq"] < 0.8 * kl["rtn"]
