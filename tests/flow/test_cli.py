"""The command line as a user meets it: every test runs the real command."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("compress", "plan", "measure", "bench", "generate", "report", "list", "show", "verify")


def laconic(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command with its output."""
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "laconic", *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=600
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refusal, checked to be one: exit code 2, nothing on stdout, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_comes_within_a_second() -> None:
    # seconds of processor time, the least of three: other work on the machine does not count
    best = 60.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = laconic("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 1.0
    assert all(command in done.stdout for command in COMMANDS)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['laconic', '--help']\ntry:\n    from laconic.cli import main\n    main()\nexcept SystemExit:\n    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(command: str) -> None:
    done = laconic(command, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"  laconic {command}" in done.stdout


def test_alone_it_prints_three_first_commands() -> None:
    done = laconic()
    assert done.returncode == 0
    assert sum(line.startswith("  laconic ") for line in done.stdout.splitlines()) == 3


def test_version() -> None:
    import laconic as package

    done = laconic("--version")
    assert (done.returncode, done.stdout) == (0, f"laconic {package.__version__}\n")


def test_list_as_json() -> None:
    rows = json.loads(laconic("list", "--json").stdout)
    names = [row["name"] for row in rows]
    assert {"quantize.round.rtn", "quantize.round.gptq", "prune.score.wanda", "prune.score.magnitude"} <= set(names)
    assert names == sorted(names)
    for row in rows:
        assert {"name", "role", "family", "catalogue", "paper", "sibling", "verdicts"} <= set(row)
        assert row["role"], row["name"]
        assert row["name"].startswith(row["family"] + ".")
        assert row["paper"]["year"] > 1900
        assert row["sibling"] in names


def test_list_by_family_and_role() -> None:
    rows = json.loads(laconic("list", "--family", "prune", "--role", "score", "--json").stdout)
    assert sorted(row["name"] for row in rows) == ["prune.score.magnitude", "prune.score.wanda"]


def test_show() -> None:
    done = laconic("show", "quantize.round.gptq")
    assert done.returncode == 0
    assert "arXiv:2210.17323" in done.stdout
    assert "sibling: quantize.round.rtn" in done.stdout
    found = json.loads(laconic("show", "quantize.round.gptq", "--json").stdout)
    assert found["doc"].startswith(found["summary"])
    assert isinstance(found["claims"], list)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "quantize.round.gtpq"), "did you mean 'quantize.round.gptq'"),
        (("show", "gptq"), "did you mean 'quantize.round.gptq'"),
        (("list", "--family", "prunes"), "did you mean 'prune'"),
        (("list", "--role", "scores"), "did you mean 'Score'"),
        (("compress",), "no budget given"),
        (("plan",), "no budget given"),
        (("compress", "--budget", "bits=4", "--max-memory", "8GB"), "not yet"),
        (("compress", "--budget", "bits=4", "--device", "tpu"), "use cpu, or cuda where"),
        (("compress", "nowhere", "--budget", "bits=4"), "nowhere"),
        (("compress", "--plan", "nowhere.json"), "does not exist"),
        (("generate", "nowhere", "--prompt", "a"), "nowhere"),
        (("generate", "--max-tokens", "0"), "at least 1"),
        (("generate", "--temperature", "-1"), "0 (always the likeliest token) or more"),
        (("generate", "--cache", "kivy:2"), "did you mean 'kivi'"),
        (("generate", "--decoder", "decode.draft.kangaroo"), "--recipe kangaroo"),
        (("generate", "--inputs", "8"), "compress it first"),
        (("measure", "nowhere"), "--against"),
        (("bench", "nowhere"), "--against"),
        (("report", "nowhere"), "laconic compress"),
        (("verify",), "verify needs one thing"),
        (("verify", "quantize.round.gtpq"), "did you mean 'quantize.round.gptq'"),
        (("verify", "--family", "prunes"), "did you mean 'prune'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # within this process: starting torch anew for each would take minutes
    from laconic.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["laconic", *words])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    code = end.value.code if isinstance(end.value.code, int) else 1
    assert says in refused(subprocess.CompletedProcess(words, code, said.out, said.err))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("compres",), ("compress", "--budgets", "bits=4"), ("show",)], ids=" ".join)
def test_wrong_usage_is_the_users_input(words: tuple[str, ...], tmp_path: Path) -> None:
    done = laconic(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_output_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "--overwrite" in refused(laconic("compress", "--budget", "bits=4", "-o", "out", cwd=tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_plan_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1, 2]")
    assert "no plan of laconic" in refused(laconic("compress", "--plan", "plan.json", cwd=tmp_path))
    (tmp_path / "plan.json").write_text("{")
    assert "cannot be read as JSON" in refused(laconic("compress", "--plan", "plan.json", cwd=tmp_path))


def test_catalogue_reads_a_card_without_importing(tmp_path: Path) -> None:
    from laconic import catalogue

    path = tmp_path / "method.py"
    path.write_text(
        '"""Kind: one line.\n\nMore."""\nimport no_such_module\nCARD = Card(Paper("A et al.", 2020, "arXiv:1"), "row", sibling="x.y.z")\n'
        "class Level: ...\nclass Kind(Score): ...\n"
    )
    entry = catalogue.read("a.b.method", path)
    assert entry is not None
    assert (entry.role, entry.family, entry.catalogue, entry.sibling) == ("Score", "a", "row", "x.y.z")
    assert entry.summary == "Kind: one line."
    assert str(entry.paper) == "A et al. 2020, arXiv:1"
    path.write_text('CARD = Card(Paper(name(), 2020, "arXiv:1"), "row", sibling="x.y.z")\n')
    with pytest.raises(ValueError, match="literals"):
        catalogue.read("a.b.method", path)


def test_a_moved_method_is_found_by_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic import catalogue

    monkeypatch.setitem(catalogue.ALIASES, "quantize.round.nearest", "quantize.round.rtn")
    assert catalogue.find("quantize.round.nearest").name == "quantize.round.rtn"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The embedded model, rounded to nearest with a little text: the folder and what the command said."""
    from laconic.zoo import corpus, nano

    if not (nano.path() / "config.json").is_file():
        pytest.skip("no embedded model in this clone")
    folder = tmp_path_factory.mktemp("cli")
    blocks = [block for _, text in corpus.named("search")[:4] for block in text.split("\n\n") if block.strip()]
    (folder / "data.txt").write_text("\n\n".join(blocks), encoding="utf-8")
    words = ("--data", "data.txt", "--budget", "bits=5", "--recipe", "rtn", "-o", "out")
    return folder, laconic("compress", *words, "--json", cwd=folder)


def test_compress_answers_with_the_certificate_alone(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = made
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    written = json.loads((folder / "out" / "certificate.json").read_text())
    assert answer["certificate"] == written
    assert written["bits_per_weight"] <= 5
    assert written["reload"]["ok"]
    assert written["replay"] == "laconic compress --budget bits=5 --recipe rtn --data data.txt --seed 0 -o out"
    assert sorted(path.name for path in folder.iterdir()) == ["data.txt", "out"]


def test_a_result_is_generated_from_measured_and_verified(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    spoken = json.loads(laconic("generate", "out", "--prompt", "def main(", "--max-tokens", "8", "--json", cwd=folder).stdout)
    assert spoken["prompt"] == "def main("
    assert isinstance(spoken["text"], str)
    found = json.loads(laconic("measure", "out", "--no-speed", "--json", cwd=folder).stdout)
    written = json.loads((folder / "out" / "certificate.json").read_text())["quality"]
    for key in ("kl_mean", "perplexity", "perplexity_original", "top1_agreement", "bytes", "bits_per_weight"):
        assert found[key] == pytest.approx(written[key], rel=1e-3)
        assert {"unit", "n", "low", "high", "spread"} <= set(found["details"][key])
    verified = laconic("verify", "out", "--json", cwd=folder)
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["reproduced"] is True


def test_a_result_rounds_its_inputs_where_asked(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import torch

    import laconic as package
    from laconic.core.errors import UserError

    out, said = made[0] / "out", list[str]()
    plain, rounded = package.load(out), package.load(out, inputs=8, log=said.append)
    assert len(said) == 1 and said[0].endswith("held layers round their inputs to 8 bits")
    assert sum(getattr(layer, "inputs", None) == 8 for layer in rounded.modules()) == int(said[0].split()[0])
    assert "inputs rounded to 8 bits" in str(rounded) and "inputs rounded" not in str(plain)
    assert {name: t.shape for name, t in rounded.state_dict().items()} == {name: t.shape for name, t in plain.state_dict().items()}
    tokens = torch.tensor([[5, 90, 300, 7, 12, 44, 1000, 2]])
    with torch.inference_mode():
        p, q = (model(tokens).logits.log_softmax(-1) for model in (plain, rounded))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    # other numbers, but not by much
    assert 1e-7 < kl < 5e-3
    pieces = list(package.generate(out, "def main(", max_tokens=4, inputs=8, log=said.append))
    assert pieces and len(said) == 2
    with pytest.raises(UserError, match="leave out thaw or inputs"):
        package.load(out, inputs=8, thaw=True)
    with pytest.raises(UserError, match="inputs=4: products round their inputs to 8 bits or not at all"):
        package.load(out, inputs=4)
    with pytest.raises(UserError, match="compress it first"):
        package.load(inputs=8)
    with pytest.raises(UserError, match="leave out --record or --inputs"):
        package.bench(out, inputs=8, record=True)


def test_a_certificate_that_says_something_else_is_not_reproduced(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    file = folder / "out" / "certificate.json"
    honest = file.read_text()
    said = json.loads(honest)
    said["quality"]["kl_mean"] *= 0.9
    file.write_text(json.dumps(said))
    done = laconic("verify", "out", "--json", cwd=folder)
    file.write_text(honest)
    assert done.returncode == 1, done.stderr
    assert [one["key"] for one in json.loads(done.stdout)["differences"]] == ["kl_mean"]


@pytest.mark.long
def test_the_page_holds_speeds_and_generations(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = made
    done = laconic("report", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "report: out/report.html\n"
    assert 10_000 < (folder / "out" / "report.html").stat().st_size < 5_000_000
    assert json.loads((folder / "out" / "measurements.json").read_text())["decode_tokens_per_s"] > 0
