"""Choosing documents: what comes out is near the target, within budget, whole or not at all; wrong input is one sentence."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import laconic
from laconic.cli import app
from laconic.core.errors import UserError

SEA = ["the", "salt", "wind", "rose", "over", "the", "harbour", "and", "every", "sail", "went", "up", "while", "the", "tide", "turned"]
CODE = ["def", "return", "yield", "lambda", "self", "args", "kwargs", "import", "class", "while", "True", "None", "assert"]


def text_of(words: list[str], seed: int, length: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(length))


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A pool of 40 texts about the sea and 160 of code, some of them twice, and 10 more about the sea as the sample."""
    pool = [text_of(SEA, i) for i in range(40)] + [text_of(CODE, 1000 + i) for i in range(160)]
    random.Random(0).shuffle(pool)
    with gzip.open(tmp_path / "pool.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*pool, *pool[:20]])
    (tmp_path / "like.txt").write_text("\n\n".join(text_of(SEA, 5000 + i) for i in range(10)), encoding="utf-8")
    return tmp_path / "pool.jsonl.gz", tmp_path / "like.txt"


def chosen(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_reads_like_the_sample_is_chosen(texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "chosen.jsonl"
    found = laconic.select(*texts, budget="examples=30", out=out)
    lines = chosen(out)
    assert found["documents"] == 200 and found["chosen"] == len(lines) == len(set(lines)) == 30
    assert all(set(text.split()) <= set(SEA) for text in lines)
    assert found["bytes"] == sum(len(text.encode()) for text in lines)
    assert found["kl_reduction"] == pytest.approx(found["kl_pool"] - found["kl_chosen"]) and found["kl_reduction"] > 0.5
    # the same seed chooses the same, another one others; the file is data for any command
    again = laconic.select(*texts, budget=["examples=30"], out=out, overwrite=True)
    assert again == found and chosen(out) == lines
    laconic.select(*texts, budget="examples=30", seed=1, out=out, overwrite=True)
    assert chosen(out) != lines
    assert not list(tmp_path.glob(".chosen*"))


def test_bytes_and_other_methods(texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "chosen.jsonl"
    found = laconic.select(*texts, budget=["size=10%", "examples=100"], out=out, search="search.allocate.knapsack")
    assert found["bytes"] <= found["bytes_pool"] // 10
    assert all(set(text.split()) <= set(SEA) for text in chosen(out))


def test_the_command(texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "chosen.jsonl"
    command = ["select", str(texts[0]), "--like", str(texts[1]), "--budget", "size=2kB", "-o", str(out)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "documents" in shown.output and f"--data {out}" in shown.output
    as_json = CliRunner().invoke(app, [*command, "--json", "--overwrite"])
    assert json.loads(as_json.stdout)["bytes"] <= 2000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": ()}, "no budget given"),
        ({"budget": "example=3"}, "did you mean 'examples'"),
        ({"budget": "examples=1.5"}, "whole number"),
        ({"budget": "size=120%"}, "over 100 %"),
        ({"budget": "size=3B"}, "below every document"),
        ({"budget": ["examples=3", "examples=4"]}, "contradicts"),
        ({"score": "prune.score.wanda"}, "family select"),
        ({"score": "prune.score.magnitude"}, "family select"),
        ({"score": "search.sample.gumbel"}, "is no score"),
        ({"search": "select.score.dsir"}, "is no search"),
        ({"search": "search.sample.gumbel(temperature=-1)"}, "below 0"),
        ({"out": "nowhere/x.jsonl"}, "does not exist"),
        ({"out": "like.txt"}, "--overwrite"),
        ({"pool": "gone.txt"}, "no such data"),
        ({"like": "chat.jsonl"}, "chat"),
    ],
)
def test_wrong_input_is_one_sentence(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    given = {"pool": texts[0], "like": texts[1], "budget": "examples=3", "out": "new.jsonl"} | change
    with pytest.raises(UserError, match=says) as error:
        laconic.select(given.pop("pool"), given.pop("like"), **given)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
