"""The quality table: which row counts at a point, what makes it stale, and a whole small run with peers that are stood in by scripts."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from bench import panel, quality
from laconic.models import open_model
from laconic.sources import code_of
from laconic.zoo import nano

MODEL, TEXT = "stories260k", "text/tinystories_1000.jsonl.gz"

# quantizes nothing: its KL must be zero
PEER = """
import json, pathlib, shutil, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--asymmetric" in sys.argv:
    args = {a: sys.argv[i + 1] for i, a in enumerate(sys.argv[:-1]) if a in ("--model", "--out", "--calibration")}
    print("a warning", file=sys.stderr)
assert pathlib.Path(args["--calibration"]).is_file()
shutil.copytree(args["--model"], args["--out"])
report = {"version": "1", "torch": "0", "setting": "none", "bits_nominal": 4, "group": 64, "symmetric": False, "bytes_linears": 400_000,
          "bytes_file": 600_000, "skipped_layers": [], "seconds_wall": 60.0, "seconds_cpu": 60.0, "peak_memory_bytes": 10**8}
(pathlib.Path(args["--out"]) / "peer.json").write_text(json.dumps(report))
"""
REFUSES = "import sys\nprint('noise', file=sys.stderr)\nprint('It needs another processor.', file=sys.stderr)\nsys.exit(3)\n"
BREAKS = "raise SystemExit('it broke')\n"


def row(tool: str, bits: float, kl: float, stored: float | None = None, **more: Any) -> dict[str, Any]:
    found = {"panel": "a", "tool": tool, "setting": f"at {bits}", "command": f"{tool} {bits}", "bits": bits, "bits_stored": stored or bits}
    found |= {"kl_mean": kl, "kl_mean_low": kl, "kl_mean_high": kl, "perplexity": 10.0, "top1_agreement": 0.9, "seconds": 6.0}
    return found | {"peak_memory_bytes": 10**8} | more


def test_the_best_row_at_equal_or_fewer_bytes_counts() -> None:
    rows = [row("hqq", 4.27, 0.2), row("hqq", 4.3125, 0.1), row("hqq", 3.25, 0.9), row("hqq", 2.25, 0.1, collapsed=True)]
    assert panel.best(rows[:3], "hqq", "a", 4.25) == rows[0]
    assert panel.best(rows[:3], "hqq", "a", 3.25) == rows[2]
    assert panel.best(rows[:3], "hqq", "a", 2.25) is None
    assert panel.best([{"tool": "hqq", "panel": "a", "reason": "no"}], "hqq", "a", 4.25) is None


def test_sizes_are_counted_in_the_peers_favour() -> None:
    shapes = {"q": (4, 128), "k": (2, 100)}
    # 4 rows: 128 x 4 bits and two 2-byte scales; 2 rows: 100 x 4 bits and two scales, the last group ragged
    assert panel.least_bytes(10_000, shapes, (), 4, 64, True) == 4 * (64 + 4) + 2 * (50 + 4)
    # a zero of 4 bits a group
    assert panel.least_bytes(10_000, shapes, (), 4, 64, False) == 4 * (64 + 4 + 1) + 2 * (50 + 4 + 1)
    # a skipped layer is charged as bf16, and never more than what is stored
    assert panel.least_bytes(10_000, shapes, ("k",), 4, 64, True) == 4 * (64 + 4) + 400
    assert panel.least_bytes(300, shapes, (), 4, 64, True) == 300


def test_a_peer_that_is_ahead_is_named() -> None:
    ours, theirs = row("laconic auto", 4.2, 0.2), row("autoround", 4.25, 0.1, stored=4.31)
    found = panel.ahead([ours, theirs])
    assert [(one["point"], one["count"], one["tool"]) for one in found] == [(4.25, "bits", "autoround")]
    assert not panel.ahead([ours, row("hqq", 4.25, 0.1, collapsed=True), row("hqq", 4.25, 0.3)])
    # with nothing of ours that small, the peer is ahead
    assert [one["point"] for one in panel.ahead([ours, row("hqq", 3.25, 0.5)])] == [3.25, 3.25]


def test_the_page_marks_best_collapsed_and_missing() -> None:
    rows = [row("laconic auto", 4.2, 0.2), row("hqq", 4.25, 0.3, collapsed=True), {**row("gptqmodel", 4.0, 0.0), "reason": "needs a GPU"}]
    del rows[2]["kl_mean"]
    result = {"rows": rows, "panels": ["a"], "quick": True, "perplexity_original": 9.0, "versions": {"laconic": "1"},
              "hardware": {"processor": "p", "threads": 2},
              "model": {"name": "m", "parameters": 10, "linears": 8, "tokens_seen": 1000},
              "data": {"length": 8, "calibrate": {"rows": 2}, "certify": {"rows": 2}}}  # fmt: skip
    text = panel.page(result, None)
    assert "| laconic `auto` | **0.2** (10, 90%) at 4.20 | none this small | none this small |" in text
    assert "| HQQ | 0.3 (10, 90%, collapsed) at 4.25 |" in text
    assert "| GPTQModel | could not run |" in text and "- GPTQModel: needs a GPU" in text
    assert "Nowhere in these rows." in text and "A reduced run" in text
    assert "hqq 4.25" in text


def test_comments_and_docstrings_are_no_code() -> None:
    text = '"""Doc."""\n\nx = "# no comment"  # one\n\n\ndef f():\n    """Doc."""\n    return x\n'
    assert code_of(text) == 'x = "# no comment"\ndef f():\n    return x'
    assert quality.code_hash() == quality.code_hash() and len(quality.code_hash()) == 64


def test_our_rows_depend_on_what_their_recipes_reach() -> None:
    found = {path.relative_to(quality.SOURCE).as_posix() for path in quality.relevant()}
    assert {
        "methods/quantize/round/gptq.py",
        "methods/quantize/grid/grouped.py",
        "kernels/obs.py",
        "core/packed.py",
        "pipeline.py",
    } <= found
    assert {"methods/search/allocate/knapsack.py", "methods/quantize/train/straight.py", "recipes/auto.yaml"} <= found
    assert not {"methods/cache/store/kivi.py", "methods/prune/score/magnitude.py", "page.py", "cli.py"} & found


def test_settings_of_the_peers() -> None:
    runs = quality.TABLE["autoround"].runs(("a", "b"), quick=False)
    assert len(runs) == 12 and all(run.panels == ("a", "b") for run in runs)
    assert sum("--best" in run.args for run in runs) == 3
    assert [len(quality.TABLE[name].runs(("a",), quick=True)) for name in quality.TABLE] == [1, 1, 1, 1]
    whole = quality.TABLE["llamacpp"].runs(("b",), quick=False)
    assert whole and all("--whole-file" in run.args for run in whole)


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three stand-ins, and one that is not installed."""
    home = tmp_path / "peers"
    for name, script in (("hqq", PEER), ("autoround", REFUSES), ("gptqmodel", BREAKS)):
        python = home / f".venv-{name}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (home / f"{name}.py").write_text(script)
    monkeypatch.setattr(quality, "PEERS", home)
    # a process for each row is for its peak memory, which nothing here looks at
    monkeypatch.setattr(quality, "alone", lambda function, job: function(job))
    # solving `auto` takes longer than all the rest, and is tested where it lives
    every = quality.our_jobs
    monkeypatch.setattr(quality, "our_jobs", lambda *args: [job for job in every(*args) if job["tool"] != "laconic auto"])
    return home


def test_a_small_run_is_kept_and_goes_stale(peers: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "quality.json"
    model = shared / MODEL
    common = ["--model", str(model), "--out", str(out)]
    run = [*common, "--data", str(shared / TEXT), "--panel", "a", "--rows", "2", "--quick", "--cache", str(tmp_path / "cache")]
    assert quality.main([*run, "--tokens", str(tmp_path / "tokens.npy")]) == 0
    assert (tmp_path / "tokens.npy").is_file()
    result = json.loads(out.read_text())
    rows = {one["tool"]: one for one in result["rows"]}
    assert list(rows) == ["laconic gptq", "laconic rtn", "hqq", "autoround", "gptqmodel", "llamacpp"]
    for name in ("laconic gptq", "laconic rtn"):
        assert rows[name]["kl_mean"] > 0 and rows[name]["bits"] <= 4.25 and rows[name]["seconds"] > 0
    assert rows["hqq"]["kl_mean"] == pytest.approx(0, abs=1e-6) and rows["hqq"]["top1_agreement"] == 1
    assert rows["autoround"]["reason"] == "It needs another processor."
    assert "exit code 1: it broke" in rows["gptqmodel"]["reason"]
    assert "bench/peers/install.sh llamacpp" in rows["llamacpp"]["reason"]
    assert result["model"]["hash"] == quality.model_hash(model)
    page = out.with_suffix(".md").read_text()
    assert "| HQQ |" in page and "It needs another processor." in page
    # ours, the measured peer and the refusal are kept; what broke is tried again
    capsys.readouterr()
    assert quality.main(run) == 0
    assert capsys.readouterr().out.count("(kept)") == 4
    assert [one.get("kl_mean") for one in json.loads(out.read_text())["rows"]] == [one.get("kl_mean") for one in result["rows"]]
    # on another machine, without the cache and without the peers, the table itself is what is kept
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(peers / ".venv-hqq")
    assert quality.main([*run, "--kept"]) == 0
    again = {one["tool"]: one for one in json.loads(out.read_text())["rows"]}
    assert again["hqq"]["kl_mean"] == rows["hqq"]["kl_mean"] and again["laconic rtn"] == rows["laconic rtn"]
    assert again["gptqmodel"]["reason"] == quality.PENDING
    assert quality.main([*common, "--check"]) == 1
    assert "1 rows were not run yet" in capsys.readouterr().out
    assert quality.main(run) == 0
    assert quality.main([*common, "--check"]) == 1
    said = capsys.readouterr().out
    assert "reduced run" in said and "panel b is missing" in said and "llama.cpp, importance matrix was not installed" in said
    # the same table, had it been a full run, passes until the model changes
    full = json.loads(out.read_text()) | {"quick": False, "rows_asked": quality.ROWS, "panels": ["a", "b"], "rows": result["rows"][:2]}
    out.write_text(json.dumps(full))
    assert quality.main([*common, "--check"]) == 0
    full["code"] = "other"
    out.write_text(json.dumps(full))
    assert quality.main([*common, "--check"]) == 1
    # one tool alone is made, the others stay as they are kept
    out.write_text(json.dumps(result | {"rows": [rows["hqq"]]}))
    assert quality.main([*run, "--make", "ours"]) == 0
    alone = {one["tool"]: one for one in json.loads(out.read_text())["rows"]}
    assert alone["laconic rtn"]["threads"] >= 1 and alone["hqq"]["kl_mean"] == rows["hqq"]["kl_mean"]
    assert alone["autoround"]["reason"] == quality.PENDING
    assert "code has changed" in capsys.readouterr().out


def test_rows_of_earlier_code_are_kept_where_a_witness_comes_out_the_same(
    peers: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "quality.json"
    run = ["--model", str(shared / MODEL), "--out", str(out), "--data", str(shared / TEXT), "--panel", "a", "--rows", "2", "--quick"]
    run += ["--cache", str(tmp_path / "cache"), "--peers", "none"]
    assert quality.main(run) == 0
    first = {one["tool"]: one for one in json.loads(out.read_text())["rows"]}
    monkeypatch.setattr(quality, "code_hash", lambda: "other")
    # a reduced table lacks the witnesses, so it shows nothing
    assert quality.main([*run, "--confirm"]) == 1
    assert "cannot be confirmed" in capsys.readouterr().out
    monkeypatch.setattr(quality, "WITNESSES", (("a", "gptq at 4.25"),))
    assert quality.main([*run, "--kept", "--confirm"]) == 0
    result = json.loads(out.read_text())
    rows = {one["tool"]: one for one in result["rows"]}
    assert result["code"] == "other" and result["confirmed"] == ["gptq at 4.25, panel a"]
    assert rows["laconic rtn"] == first["laconic rtn"] | {"key": rows["laconic rtn"]["key"], "confirmed": True}
    assert rows["laconic gptq"]["kl_mean"] == first["laconic gptq"]["kl_mean"] and "confirmed" not in rows["laconic gptq"]
    assert "the same figures to the last digit: gptq at 4.25, panel a." in " ".join(out.with_suffix(".md").read_text().split())
    # the next code makes the witness otherwise: nothing is kept, nothing is written
    monkeypatch.setattr(quality, "code_hash", lambda: "another")
    for one in result["rows"]:
        one["kl_mean"] *= 1 + 1e-12
    out.write_text(json.dumps(result))
    assert quality.main([*run, "--kept", "--confirm"]) == 1
    assert "comes out otherwise" in capsys.readouterr().out
    assert json.loads(out.read_text())["code"] == "other"


def test_a_wrong_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--peers", "awq"])
    assert stopped.value.code == 2
    assert "unknown peer awq" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--make", "ours,awq"])
    assert stopped.value.code == 2
    assert "unknown tool awq in --make" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("name", quality.TABLE)
def test_an_installed_peer_quantizes_nano(tmp_path: Path, name: str) -> None:
    """The tool itself, in its own environment: what it writes is nano in fewer bytes, and near to it."""
    peer = quality.TABLE[name]
    if not peer.python().exists():
        pytest.skip(f"{name} is not installed; bench/peers/install.sh {name} does it")
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 4096, (16, 128)))
    found = quality.run_peer(peer, peer.runs(["a"], quick=True)[0], nano.path(), tokens, tmp_path / "out", 1)
    assert "reason" not in found, found
    original = open_model(None, default=nano.path())
    linears = [site.tensors["weight"].name for segment in original.anatomy.segments() if segment.name for site in segment.sites]
    dense = sum(math.prod(original.infos[weight].shape) * 2 for weight in linears)
    assert 0.2 * dense < found["bytes_linears"] < 0.35 * dense
    made = load_file(tmp_path / "out" / "model.safetensors")
    for weight in linears:
        was = original.read(weight).float()
        assert 0 < (made[weight].float() - was).norm() < 0.2 * was.norm()
