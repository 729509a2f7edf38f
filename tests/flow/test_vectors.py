"""A file of vectors through the commands: a floor for recall, short vectors that load at any size up to their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import laconic
from laconic import artifact, models, vectors
from laconic.core.errors import UserError

SAYS = {"log": lambda line: None}


def table(count: int = 400, width: int = 24) -> np.ndarray:
    """Vectors in eight clouds, most of their energy in few directions."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    flat = rng.normal(size=(8, width))[rng.integers(0, 8, count)] + 0.7 * rng.normal(size=(count, width))
    return (flat * np.linspace(2, 0.05, width) @ turn).astype(np.float32)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("given") / "vectors.npy"
    np.save(file, table())
    return file


@pytest.fixture(scope="module")
def made(given: Path) -> Path:
    out = given.parent / "out"
    laconic.compress(given, budget="recall=0.8", recipe="mrl", out=out, **SAYS)
    return out


def test_the_floor_is_kept_with_fewer_numbers(given: Path, made: Path) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    quality, dims = certificate["quality"], certificate["dims"]
    assert 2 <= dims < 24 and quality["recall"] > 0.75 and quality["recall_low"] <= quality["recall"] <= quality["recall_high"]
    assert (
        certificate["bytes"]
        == 2 * dims * (400 + 24)
        == sum(info.stop - info.start for info in models.header(made / "model.safetensors").values())
    )
    recalls = [one["recall"] for one in quality["sizes"]]
    assert recalls == sorted(recalls) and quality["sizes"][-1] == {**quality["sizes"][-1], "dims": dims, "recall": quality["recall"]}
    # the same figure, by hand
    short = laconic.load(made)
    x = torch.nn.functional.normalize(torch.from_numpy(table()), dim=1)
    queries = vectors.parted(400, 0).certify
    shares = []
    for q in queries.tolist():
        wanted, got = ((one @ one[q]).index_fill(0, torch.tensor([q]), -9).topk(10).indices for one in (x, short.vectors))
        shares.append(len({*wanted.tolist()} & {*got.tolist()}) / 10)
    assert sum(shares) / len(shares) == pytest.approx(quality["recall"], abs=0.01)
    assert laconic.measure(made)["recall"] == pytest.approx(quality["recall"], abs=1e-6)
    again = laconic.verify(made)
    assert again["ok"] and "recall" in again["compared"]
    with pytest.raises(UserError, match="no page for them yet"):
        laconic.report(made)


def test_new_vectors_are_shortened_and_searched(made: Path) -> None:
    short = laconic.load(made)
    x = torch.from_numpy(table())[:5]
    assert short(x).shape == (5, short.dims)
    torch.testing.assert_close(short(x), short.vectors[:5], rtol=0, atol=2e-3)
    assert short.search(x, 3)[:, 0].tolist() == list(range(5))
    assert short.search(x, 3, first=2, shortlist=200)[:, 0].tolist() == list(range(5))
    with pytest.raises(UserError, match="ask for 1 to"):
        short.search(x, first=99)


def test_only_the_first_numbers_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = os.preadv

    def preadv(handle: int, buffers: list, offset: int) -> int:
        nonlocal read
        got = real(handle, buffers, offset)
        read += got
        return got

    monkeypatch.setattr(models.os, "preadv", preadv)
    whole = laconic.load(made)
    read = 0
    short = laconic.load(made, budget="dims=2")
    assert (short.dims, short.nbytes) == (2, read) == (2, 2 * 2 * (400 + 24))
    assert torch.equal(short.columns, whole.columns[:2]) and torch.equal(short.projection, whole.projection[:2])
    assert laconic.load(made, budget="size=1700B").dims == 2
    sizes = json.loads((made / "certificate.json").read_text())["quality"]["sizes"]
    assert laconic.load(made, budget=f"recall={sizes[0]['recall']}").dims == sizes[0]["dims"]
    with pytest.raises(UserError, match=r"reaches no recall of 0\.999"):
        laconic.load(made, budget="recall=0.999")
    with pytest.raises(UserError, match="numbers of each vector, not 24"):
        laconic.load(made, budget="dims=24")


def test_every_kind_of_file_and_the_same_again(given: Path, made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", vectors=table(), words=np.array(["a", "b"]))
    save_file({"anything": torch.from_numpy(table())}, tmp_path / "v.safetensors")
    first = json.loads((made / "certificate.json").read_text())
    for name in ("v.npz", "v.safetensors"):
        certificate = laconic.compress(tmp_path / name, budget="recall=0.8", out=tmp_path / f"{name}-out", **SAYS).certificate
        assert certificate["files"] == first["files"]


def test_cut_off_it_goes_on(given: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, learned = vectors._quality, []
    monkeypatch.setattr(vectors, "learned", lambda *a, _real=vectors.learned, **k: learned.append(1) or _real(*a, **k))

    def broken(*args):
        monkeypatch.setattr(vectors, "_quality", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(vectors, "_quality", broken)
    with pytest.raises(KeyboardInterrupt):
        laconic.compress(given, budget="recall=0.8", recipe="mrl", out=tmp_path / "out", **SAYS)
    assert not (tmp_path / "out").exists()
    again = laconic.compress(given, budget="recall=0.8", recipe="mrl", out=tmp_path / "out", **SAYS)
    assert again.certificate["files"] == json.loads((made / "certificate.json").read_text())["files"]
    assert learned == [1]


def test_what_makes_no_sense_is_one_sentence(given: Path, made: Path, tmp_path: Path) -> None:
    def refused(match: str, file: Path | None = None, **more) -> None:
        with pytest.raises(UserError, match=match):
            laconic.compress(given if file is None else file, **{"budget": "recall=0.8", "out": tmp_path / "no", **SAYS, **more})
        assert not (tmp_path / "no").exists() and not (tmp_path / ".no.laconic").exists()

    refused("no budget given; add --budget recall=0.95", budget=None)
    refused("is for models; take --recipe mrl", recipe="gptq")
    refused("not understood", budget="bits=4")
    refused("is not reached with 1 of 24 numbers", budget=["recall=0.9", "dims=1"])
    refused("no such file of vectors", tmp_path / "none.npy")
    np.save(tmp_path / "few.npy", table(20))
    refused("too few to measure recall at 10", tmp_path / "few.npy")
    np.save(tmp_path / "nan.npy", np.full((99, 4), np.nan, dtype=np.float32))
    refused("not finite", tmp_path / "nan.npy")
    (tmp_path / "junk.npz").write_bytes(b"no archive")
    refused("cannot be read", tmp_path / "junk.npz")
    np.savez(tmp_path / "two.npz", a=table(), b=table())
    refused("holds 2 tables", tmp_path / "two.npz")
    with pytest.raises(UserError, match="is for a file of vectors"):
        laconic.compress(recipe="mrl", budget="size=50%", out=tmp_path / "no", **SAYS)
    with pytest.raises(UserError, match="holds vectors and no model"):
        artifact.stream(made)


def test_the_command_line(given: Path, tmp_path: Path) -> None:
    def laconic_(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "laconic", *words], capture_output=True, text=True, check=False, timeout=300)

    done = laconic_("compress", str(given), "--recipe", "mrl", "--budget", "recall=0.8", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "recall at 10, held-out queries" in done.stdout + done.stderr
    shown = laconic_("measure", str(tmp_path / "out"), "--budget", "dims=2", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["dims"] == 2
