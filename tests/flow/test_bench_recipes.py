"""The table of named schemes: each is a recipe, rows are kept and made anew as they should be, the page says what they came to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import recipes
from laconic.recipe import load_recipe
from laconic.zoo import mamba, nano


def test_every_scheme_is_a_recipe_and_every_model_a_command():
    for scheme in recipes.SCHEMES:
        load_recipe(scheme)
    for subject in recipes.SUBJECTS.values():
        words = recipes.filled(recipes.command(subject, "w8a8"), Path("/data"))
        assert words[0] == "compress" and words[-4:] == ["--recipe", "w8a8", "-o", "OUT"]
        assert not any("DATA" in word for word in words)
    assert recipes.filled(["zoo/models/mamba"], None) == [str(mamba.path())]


def test_a_row_is_made_once_and_again_where_what_it_depends_on_changes(monkeypatch):
    made: list[tuple[str, str]] = []

    def make(subject, scheme, data, threads):
        made.append((subject.title, scheme))
        return {"kl_mean": 0.1, "top1_agreement": 0.9, "bits_per_weight": 4.2}

    monkeypatch.setattr(recipes, "make", make)
    first = list(recipes.rows(["nano"], ["w4a16", "fp8"], None, [], 1))
    assert len(made) == 2 and [row["scheme"] for row in first] == ["w4a16", "fp8"]
    assert list(recipes.rows(["nano"], ["w4a16", "fp8"], None, first, 1)) == first and len(made) == 2
    monkeypatch.setattr(recipes, "code_hash", lambda scheme: "another")
    again = list(recipes.rows(["nano"], ["w4a16"], None, first, 1))
    assert len(made) == 3 and again[0]["key"] != first[0]["key"]


def test_a_model_whose_data_is_not_here_is_left_out_by_name(tmp_path):
    for data in (None, tmp_path):
        (row,) = recipes.rows(["resnet20"], ["w8a8"], data, [], 1)
        assert row["reason"].endswith("is not here; name its folder with --data") and "key" not in row


def test_weights_decide_what_a_row_is_of(tmp_path):
    nano_hash = recipes.model_of(recipes.SUBJECTS["nano"], None)
    assert nano_hash != recipes.model_of(recipes.SUBJECTS["mamba"], None)
    folder = tmp_path / "stories260k"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    seen = set()
    for content in (b"a", b"b"):
        (folder / "model.safetensors").write_bytes(content)
        seen.add(recipes.model_of(recipes.SUBJECTS["stories260k"], tmp_path))
    assert len(seen) == 2 and nano.path().is_dir()


def test_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipes, "make", lambda *_: {"kl_mean": 0.01234, "top1_agreement": 0.95, "bits_per_weight": 4.25})
    out = tmp_path / "recipes.json"
    assert recipes.main(["--models", "nano", "--schemes", "fp8,mxfp4", "--out", str(out)]) == 0
    assert recipes.main(["--models", "nano,mamba", "--schemes", "fp8", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["scheme"]) for row in kept] == [("nano", "fp8"), ("nano", "mxfp4"), ("mamba", "fp8")]
    page = out.with_suffix(".md").read_text()
    assert "| `fp8` | 0.0123, 95.0%, 4.25 | 0.0123, 95.0%, 4.25 |" in page
    assert "| `mxfp4` | 0.0123, 95.0%, 4.25 | not run yet |" in page
    assert "nano fp8: 0.0123" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipes.main(["--models", "nani"])
    assert "unknown model nani" in capsys.readouterr().err
