"""One file, many sizes: the recipe bitstack on small real models, cut when it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import laconic
from laconic import artifact, elastic, models
from laconic.core.errors import UserError
from laconic.data import open_data
from laconic.job import compress, quality_of
from laconic.models import open_model
from laconic.recipe import Recipe, load_recipe

SAYS = {"log": lambda line: None}


@pytest.fixture(scope="module")
def small(tiny: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """A Llama of two layers, wild enough that its blocks matter, and text for it."""
    return tiny(layers=2, blocks=200, intermediate_size=80, initializer_range=0.3)


def split_of(small: tuple[Path, Path]):
    return open_data(str(small[1]), open_model(small[0]), seed=0, length=32, limits=(8, 4, 8))


def run(small: tuple[Path, Path], out: Path, recipe: str = "bitstack", budget: str = "size=97%", **more):
    source = open_model(small[0])
    return compress(source, split_of(small), budget=[budget], recipe=load_recipe(recipe), out=out, **SAYS, **more)


@pytest.fixture(scope="module")
def made(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    run(small, out)
    return out


def sizes(out: Path, count: int = 3) -> list[int]:
    """Budgets from the least to the whole."""
    index = artifact.elastic(out)
    assert index is not None
    ends = [index.least, *(size for _, size in index.slices)]
    return [ends[i * (len(ends) - 1) // (count - 1)] for i in range(count)]


def test_three_budgets_from_one_file(small: tuple[Path, Path], made: Path) -> None:
    source, split = open_model(small[0]), split_of(small)
    found = []
    for limit in sizes(made):
        cut = artifact.stream(made, limit=limit)
        assert sum(info.stop - info.start for info in cut.infos.values()) == limit
        found.append(quality_of(source, cut, split.certify, metric=split.metric, batch=4)["kl_mean"])
    assert found[0] > 2 * found[1] > 4 * found[2]
    # the whole is what was certified, and the least is in the table
    certificate = json.loads((made / "certificate.json").read_text())
    assert certificate["quality"]["kl_mean"] == pytest.approx(found[2], rel=1e-3)
    assert certificate["bytes"] == sizes(made)[-1] == artifact.bytes_of(made)
    table = certificate["elastic"]
    assert table[0]["bytes"] == sizes(made)[0] and table[0]["kl_mean"] == pytest.approx(found[0], rel=1e-3)
    assert [one["kl_mean"] for one in table] == sorted((one["kl_mean"] for one in table), reverse=True)
    assert "loads at any size" in (made / "README.md").read_text()


def test_every_layer_has_a_block_and_no_budget_is_exceeded(made: Path) -> None:
    index = artifact.elastic(made)
    assert index is not None
    whole = artifact.stream(made)
    stacks = {name: whole.packed(name).parts for name in whole.forms}
    assert len(stacks) == 14 and set(stacks.values()) == {max(stacks.values())} and max(stacks.values()) > 3
    tokens = torch.randint(0, 4096, (1, 12))
    before = index.least
    for limit in range(index.least, index.slices[-1][1], 2_000):
        cut = artifact.stream(made, limit=limit)
        parts = [cut.packed(name).parts for name in cut.forms]
        # rounds follow one another
        assert min(parts) >= 1 and max(parts) - min(parts) <= 1
        held = sum(info.stop - info.start for info in cut.infos.values())
        assert before <= held <= limit
        before = held
        assert torch.isfinite(cut.load(torch.float32)(tokens).logits).all()


def test_only_the_bytes_of_the_prefix_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(handle: int, buffers: list, offset: int) -> int:
        got = real(handle, buffers, offset)
        ranges.append((offset, offset + got))
        return got

    monkeypatch.setattr(models.os, "preadv", preadv)
    header = 8 + int.from_bytes((made / "model.safetensors").read_bytes()[:8], "little")
    for limit in sizes(made, 4):
        ranges.clear()
        model = laconic.load(made, budget=f"size={limit}B")
        # each tensor once, and together the first `limit` bytes of the file and no other
        ranges.sort()
        assert ranges[0][0] == header and ranges[-1][1] == header + limit
        assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))
        held = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if ".weight." in name)
        assert held < limit


def test_loads_by_every_word_and_through_transformers(small: tuple[Path, Path], made: Path) -> None:
    tokens = torch.randint(0, 4096, (2, 12))
    parameters = open_model(small[0]).parameters
    with torch.no_grad():
        whole = laconic.load(made)(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)(tokens).logits, whole)
        assert torch.equal(laconic.load(made, budget="size=100%")(tokens).logits, whole)
        limit = sizes(made)[1]
        same = [
            laconic.load(made, budget=words)(tokens).logits
            for words in (f"size={limit}B", [f"size={limit / 1e6}MB"], laconic.Budget(bits=(limit + 0.5) * 8 / parameters))
        ]
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2]) and not torch.equal(same[0], whole)


def test_what_cannot_be_cut_says_so(small: tuple[Path, Path], made: Path, tmp_path: Path) -> None:
    least = sizes(made)[0]
    with pytest.raises(UserError, match=f"the least is {least:,} bytes; ask for size="):
        laconic.load(made, budget="bits=1")
    with pytest.raises(UserError, match="not yet"):
        laconic.load(made, budget="latency=0.5x")
    with pytest.raises(UserError, match="is an original"):
        laconic.load(small[0], budget="bits=4")
    run(small, tmp_path / "plain", "rtn", "bits=6")
    with pytest.raises(UserError, match="has one size and cannot be cut"):
        laconic.load(tmp_path / "plain", budget="bits=4")
    with pytest.raises(UserError, match="has one size"):
        artifact.stream(tmp_path / "plain", limit=10**9)
    with pytest.raises(UserError, match="the least is"):
        run(small, tmp_path / "out", budget="bits=1")
    damaged = json.loads((made / "elastic.json").read_text())
    (tmp_path / "plain" / "elastic.json").write_text(json.dumps(damaged | {"slices": [{"tensor": "x"}]}))
    with pytest.raises(UserError, match="damaged"):
        laconic.load(tmp_path / "plain", budget="size=99%")
    (tmp_path / "plain" / "elastic.json").write_text(json.dumps(damaged | {"slices": [{"tensor": "x", "bytes": 9}]}))
    with pytest.raises(UserError, match="has no form here"):
        laconic.load(tmp_path / "plain", budget="size=99%")


def test_cut_off_while_it_is_ordered_it_goes_on(
    small: tuple[Path, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = []
    real = elastic.damages

    def damages(view, names, *rest, **more):
        trials.append(dict(view.counts))
        if len(trials) == 3:
            raise KeyboardInterrupt
        return real(view, names, *rest, **more)

    monkeypatch.setattr(elastic, "damages", damages)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(small, tmp_path / "out")["files"] == json.loads((made / "certificate.json").read_text())["files"]
    rounds = max(max(counts.values()) for counts in trials)
    # two rounds before it was cut off, the third again, none of the first two
    assert len(trials) == rounds + 1 and trials[2] == trials[3]


def test_a_module_without_layers_is_cut_too(tmp_path: Path, flat_net: Callable[[int], tuple[str, str]]) -> None:
    factory, data = flat_net(6)
    levels = tuple({"blocks": blocks, "rank": 2} for blocks in (1, 4))
    recipe = Recipe.model_validate({
        "name": "flat", "search": "search.allocate.uniform", "judge": False, "order": "nest.order.rounds",
        "choices": [{"method": "nest.bits.bitstack", "levels": levels, "kinds": ["linear"]}],
    })  # fmt: skip
    laconic.compress(factory, data, budget="size=99%", recipe=recipe, out=tmp_path / "out", **SAYS)
    first, *_, last = sizes(tmp_path / "out")
    x = torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        original = open_model(factory).load(torch.float32)(x)
        errors = [float((laconic.load(tmp_path / "out", budget=f"size={limit}B")(x) - original).norm()) for limit in (first, last)]
    assert errors[1] < errors[0] / 3


def test_the_command_line_cuts(small: tuple[Path, Path], made: Path) -> None:
    def laconic_(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "laconic", *words], capture_output=True, text=True, check=False, timeout=300)

    limit = sizes(made)[1]
    shown = laconic_("measure", str(made), "--budget", f"size={limit}B", "--data", str(small[1]), "--no-speed", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["bytes"] == limit and found["kl_mean"] > 0
    written = laconic_("generate", str(made), "--budget", f"size={limit}B", "--prompt", "def", "--max-tokens", "3", "--json")
    assert written.returncode == 0, written.stderr
    refused = laconic_("generate", str(made), "--budget", "bits=1", "--prompt", "def")
    assert refused.returncode == 2 and "the least is" in refused.stderr and "\n" not in refused.stderr.strip()


def test_two_stacks_are_refused_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_net.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2))
                self.second = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(2))
                self.head = nn.Linear(12, 3)

            def forward(self, x):
                for layer in self.first:
                    x = layer(x)
                for layer in self.second:
                    x = layer(x)
                return self.head(x)

        def make():
            torch.manual_seed(1)
            return Two().eval()

        def data():
            g = torch.Generator().manual_seed(0)
            for _ in range(6):
                yield torch.randn(16, 12, generator=g), torch.randint(0, 3, (16,), generator=g)

        data.metric = "accuracy"
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"2 stacks of layers \(first, second\), whose parts are not ordered yet"):
        laconic.compress("two_net:make", "two_net:data", budget="size=90%", recipe="bitstack", out=tmp_path / "out", **SAYS)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.laconic").exists()
