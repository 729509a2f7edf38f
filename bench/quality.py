"""The quality table: `python -m bench.quality` compares laconic with HQQ, AutoRound, GPTQModel and llama.cpp on one model and one text.

Every row that finished is kept, in bench/results/.cache and in the table itself, under a hash of all that it depends on, so a run that is
stopped goes on, and a rerun does only what changed. `--kept` writes the table of what is kept and says what is not there yet. `--check` is
the gate: exit code 1 where the table no longer fits the model or the code."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.panel import BASELINE, PANELS, POINTS, ahead, is_ours, least_bytes, page, title
from laconic.sources import hash_of, reached

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PEERS = ROOT / "bench" / "peers"
SOURCE = ROOT / "src" / "laconic"
# what every row of ours depends on, beside the methods of the recipes and what both import of core, methods and kernels
RELEVANT = ("aligning.py", "anatomy.py", "architectures.py", "budget.py", "calibration.py", "cutting.py", "decoding.py", "elastic.py",
            "experts.py", "job.py", "nesting.py", "pipeline.py", "recipe.py", "reconstruction.py", "routing.py", "trials.py",
            "tuning.py")  # fmt: skip
# the recipes of our rows
OURS = ("auto", "gptq", "rtn")
# what both ours and the peers' figures are computed with
EVALUATOR = "kernels/divergence.py"
ROWS = 128
HOURS = 4
ABSENT = "is not installed here"
PENDING = "not run yet"
# rows that are made again to show that a change of code changed no figure: every method of ours, with and without the embedding
WITNESSES = (("a", "auto at 2.25"), ("b", "gptq at 3.25"), ("b", "rtn at 4.25"))
# what must come out the same to the last digit
FIGURES = ("kl_mean", "kl_mean_low", "kl_mean_high", "perplexity", "top1_agreement", "bytes_linears", "bytes_file", "levels", "judged")
# what a row is told by the table, not by its own run
PLACE = ("panel", "tool", "setting", "command", "point")

Row = dict[str, Any]
Job = dict[str, Any]


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(line, flush=True)


# ---- hashes


def relevant(names: Sequence[str] = OURS) -> list[Path]:
    """The files that decide what rows of these recipes come to."""
    recipes = [SOURCE / "recipes" / f"{name}.yaml" for name in names]
    named = {name for path in recipes for name in re.findall(r"[a-z]+(?:\.[a-z_0-9]+){2}", path.read_text(encoding="utf-8"))}
    methods = [SOURCE.joinpath("methods", *name.split(".")).with_suffix(".py") for name in named]
    return [*reached([*(SOURCE / name for name in RELEVANT), *methods]), *recipes]


def code_hash() -> str:
    """Of all these files."""
    return hash_of(relevant())


def evaluator_hash() -> str:
    """Of the code that turns logits into figures."""
    return hash_of([SOURCE / EVALUATOR])


def model_hash(folder: Path) -> str:
    """Of weight files and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """The name of a cached row."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# ---- peers


@dataclass(frozen=True)
class Run:
    """One row to be made by a peer. panels: where it stands; a tool that leaves the embedding alone stands in both with one run."""

    panels: tuple[str, ...]
    setting: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """A tool of its own environment. dist: its distribution there; whole: whether `--whole-file` changes what it stores; types: named
    formats for panel a, mixtures for panel b, in place of bits and groups; best: whether it has a best recipe of its own."""

    name: str
    dist: str
    whole: bool = False
    best: bool = False
    types: tuple[str, ...] = ()
    mixtures: tuple[str, ...] = ()

    def python(self) -> Path:
        """The interpreter of its environment."""
        return PEERS / f".venv-{self.name}" / "bin" / "python"

    def version(self) -> str:
        """From the names of the installed distributions: nothing is imported."""
        found = [p.name for p in self.python().parent.parent.glob(f"lib/python3*/site-packages/{self.dist}-*.dist-info")]
        if found:
            return found[0].removeprefix(f"{self.dist}-").removesuffix(".dist-info")
        # not installed: the one that install.sh would install, so that rows of an earlier table are found again
        script = PEERS / "install.sh"
        pinned = re.search(rf"{self.dist.replace('_', '[-_]')}==([\w.]+)", script.read_text(encoding="utf-8")) if script.is_file() else None
        return pinned[1] if pinned else ""

    def script_hash(self) -> str:
        """Of its script and of what the scripts share."""
        return hash_of([p for p in (PEERS / f"{self.name}.py", PEERS / "common.py") if p.is_file()], PEERS)

    def runs(self, panels: Sequence[str], quick: bool) -> list[Run]:
        """Everything to be run, the first of each panel alone where quick."""
        if self.types:
            found = {
                "a": [Run(("a",), kind, ("--type", kind)) for kind in self.types],
                "b": [Run(("b",), f"{kind}, whole file", ("--type", kind, "--whole-file")) for kind in self.mixtures],
            }
            return [run for panel in panels for run in (found[panel][:1] if quick else found[panel])]
        both = tuple(panels)
        plain = [
            Run(
                both, f"W{bits} g{group} {'asymmetric' if zeros else 'symmetric'}", _grid(bits, group, *(["--asymmetric"] if zeros else []))
            )
            # groups of 64 with zero points exceed every point, so they count nowhere
            for group, zeros in ((128, True), (64, False), (128, False))
            for bits in (4, 3, 2)
        ]
        best = [Run(both, f"W{bits} g64 symmetric, best recipe", _grid(bits, 64, "--best")) for bits in (4, 3, 2)] if self.best else []
        return plain[:1] if quick else plain + best


def _grid(bits: int, group: int, *more: str) -> tuple[str, ...]:
    return ("--bits", str(bits), "--group", str(group), *more)


TABLE: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("hqq", "hqq"),
        Peer("autoround", "auto_round", best=True),
        Peer("gptqmodel", "gptqmodel"),
        Peer(
            "llamacpp",
            "llama_cpp_python",
            whole=True,
            types=("IQ4_XS", "Q4_0", "Q4_1", "IQ4_NL", "Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
            mixtures=("Q3_K_S", "Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q3_K_M", "Q3_K_L", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS",
                      "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_XS", "IQ2_XXS"),
        ),
    )
}  # fmt: skip


def shown(peer: Peer, run: Run) -> str:
    """The command as it is kept: without this machine's folders."""
    script = f"bench/peers/{peer.name}.py"
    return shlex.join(
        [f"bench/peers/.venv-{peer.name}/bin/python", script, "--model", "MODEL", "--calibration", "TOKENS", *run.args, "--out", "OUT"]
    )


def run_peer(peer: Peer, run: Run, model: Path, tokens: Path, out: Path, threads: int) -> dict[str, Any]:
    """Its report, or {"reason": one sentence, "final": whether it would say so again}."""
    command = [str(peer.python()), str(PEERS / f"{peer.name}.py"), "--model", str(model), "--calibration", str(tokens), *run.args]
    # the table's own paths must not reach another environment
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["OMP_NUM_THREADS"] = str(threads)
    # in the scratch folder, because some tools write logs where they stand
    out.parent.mkdir(parents=True, exist_ok=True)
    # Linux counts the peak of the process that starts a program as the program's own; a shell between them is small
    between = ["sh", "-c", '"$@"; exit $?', "sh", *command, "--out", str(out)]
    started = subprocess.Popen(
        between,
        cwd=out.parent,
        env=clean,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = started.communicate(timeout=HOURS * 3600)
    except subprocess.TimeoutExpired:
        return {"reason": f"stopped after {HOURS} hours without a result", "final": False}
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no message")
    if started.returncode == 3:
        return {"reason": last, "final": True}
    if started.returncode or not (out / "peer.json").is_file():
        return {"reason": f"ended with exit code {started.returncode}: {last[:300]}", "final": False}
    return dict(json.loads((out / "peer.json").read_text(encoding="utf-8")))


# ---- ours


def open_all(model: str, data: str | None, rows: int) -> tuple[Any, Any]:
    """The original and its three parts of text; the default ones are the standard library's modules."""
    from laconic.data import Texts, open_data
    from laconic.models import open_model
    from laconic.zoo import corpus

    def default() -> Texts:
        texts = {name: [text for _, text in corpus.named(name)] for name in corpus.LISTS}
        return Texts(**texts, record={name: corpus.record(name) for name in corpus.LISTS})

    source = open_model(model)
    limits = (rows, max(4, rows // 4), max(8, rows // 2))
    return source, open_data(data, source, seed=0, limits=limits, default=default)


def linears_of(source: Any) -> dict[str, tuple[int, int]]:
    """Stored name -> (n, m) of every matrix inside a layer."""
    return {
        site.tensors["weight"].name: tuple(site.matrix) for segment in source.anatomy.segments() if segment.name for site in segment.sites
    }


def outside(source: Any) -> str:
    """A pattern of the sites that stand outside the layers."""
    names = [site.name for segment in source.anatomy.segments() if not segment.name for site in segment.sites]
    return "|".join(re.escape(name) for name in names) or "(?!)"


def our_jobs(source: Any, panels: Sequence[str], quick: bool) -> list[Job]:
    """Recipes and budgets of our rows: all in both panels."""
    from laconic.recipe import load_recipe

    linears = sum(n * m for n, m in linears_of(source).values())
    points = POINTS[:1] if quick else POINTS
    # everything that no recipe touches in panel a, as bf16
    rest = 2 * (source.parameters - linears)
    found: list[Job] = []
    for panel in panels:
        for point in points:
            # the header of the weight file counts in panel b: names, shapes and places of up to three tensors a matrix
            bits = point if panel == "a" else point - 8 * 3 * 140 * len(source.infos) / source.parameters
            budget = f"size={int(point * linears / 8) + rest}B" if panel == "a" else f"bits={bits:.4f}"
            recipes = [(f"laconic {name}", name, load_recipe(name)) for name in OURS]
            for tool, setting, recipe in recipes:
                kept = recipe.model_copy(update={"keep": outside(source)}) if panel == "a" else recipe
                command = (
                    f"laconic compress MODEL --recipe {recipe.name if panel == 'b' else f'{recipe.name}.yaml'} --budget {budget} -o OUT"
                )
                if panel == "a":
                    command += f"  # {recipe.name}.yaml: recipe {recipe.name}, keep: {kept.keep}"
                found.append({"panel": panel, "tool": tool, "setting": f"{setting} at {point:g}", "point": point, "recipe": kept.resolved(),
                              "budget": budget, "command": command})  # fmt: skip
    return found


def make_ours(job: Job) -> Row:
    """The whole job of the command line in a scratch folder; its certificate is the row."""
    import torch

    from laconic.core.errors import UserError
    from laconic.job import compress
    from laconic.kernels.memory import give_back
    from laconic.measurement import peak_memory
    from laconic.recipe import Recipe

    # as the command does: without it one and the same job peaked at 0.8 to 2.1 GB
    give_back()
    torch.set_num_threads(job["threads"])
    source, split = open_all(job["model"], job["data"], job["rows"])
    out = Path(job["scratch"]) / "out"
    recipe = Recipe.model_validate(job["recipe"])
    try:
        certificate = compress(source, split, budget=[job["budget"]], recipe=recipe, out=out, log=lambda _: None)
    except UserError as error:
        return {"reason": str(error), "final": True}
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    chosen = {name: choice["bytes"] for choice in plan["choices"] for name in choice["covers"]}
    seconds = certificate["measurements"]["seconds"]
    counted = Counter(f"{choice['method']} {_level(choice['level'])}" for choice in plan["choices"])
    return {
        "bytes_linears": sum(chosen.get(name, 2 * n * m) for name, (n, m) in linears_of(source).items()),
        "bytes_file": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "seconds": seconds["plan"] + seconds["apply"] + seconds["tune"],
        "peak_memory_bytes": peak_memory(),
        "judged": plan["judged"],
        "levels": dict(counted.most_common()),
        **_measured(certificate["quality"]),
    }


def _level(level: Mapping[str, Any]) -> str:
    usual = (("scales", "bf16"), ("zeros", "whole"))
    plain = {key: value for key, value in level.items() if value is not None and (key, value) not in usual}
    return " ".join(f"{key}=({_level(value)})" if isinstance(value, Mapping) else f"{key}={value}" for key, value in plain.items())


def _measured(quality: Mapping[str, Any]) -> Row:
    keys = ("kl_mean", "kl_mean_low", "kl_mean_high", "perplexity", "perplexity_original", "top1_agreement", "collapsed")
    return {key: quality[key] for key in keys if key in quality}


def alone(function: Callable[[Job], Row], job: Job) -> Row:
    """A call in a process of its own, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (job,))


# ---- the run


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share."""

    model: Path
    data: str | None
    rows: int
    quick: bool
    panels: tuple[str, ...]
    source: Any
    split: Any
    cache: Path
    hash: str
    # rows of an earlier table by key
    earlier: Mapping[str, Row]
    # whose rows are made where they are not kept
    make: Sequence[str]
    threads: int

    def identity(self) -> list[Any]:
        """Model and tokens: part of every cached row's name."""
        return [
            self.hash,
            *(getattr(self.split, part).sha256 for part in ("calibrate", "search", "certify")),
            evaluator_hash(),
        ]

    def holds(self, key: str) -> bool:
        """Whether a row is kept."""
        return key in self.earlier or (self.cache / f"{key}.json").is_file()

    def cached(self, key: str, tool: str, make: Callable[[], Row]) -> tuple[Row, bool]:
        """A row of a tool that is kept, or made and kept. A failure that may pass is not kept."""
        file = self.cache / f"{key}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8")), True
        if key in self.earlier:
            return {name: value for name, value in self.earlier[key].items() if name not in PLACE}, True
        if tool not in self.make:
            return {"reason": PENDING}, False
        from laconic.measurement import hardware

        row = make()
        if row.pop("final", True):
            row |= {"key": key, "threads": self.threads, "processor": hardware()["processor"]}
            self.cache.mkdir(parents=True, exist_ok=True)
            near = file.with_suffix(".new")
            near.write_text(json.dumps(row), encoding="utf-8")
            near.replace(file)
        return row, False

    def sizes(self, row: Row, panel: str) -> Row:
        """bytes and bits of a row in a panel; `bits` counts in the peer's favour."""
        if "reason" in row:
            return {}
        if panel == "a":
            count = sum(n * m for n, m in linears_of(self.source).values())
            stored = int(row["bytes_linears"])
            least = int(row.get("bytes_linears_least", stored))
        else:
            # a file that also holds the tokenizer is charged for its tensors alone, where the tool tells them apart
            count = int(self.source.parameters)
            stored = int(row["bytes_file"])
            least = min(stored, int(row.get("bytes_tensors", stored)))
        return {"bytes": least, "bits": 8 * least / count, "bytes_stored": stored, "bits_stored": 8 * stored / count}


def our_rows(bench: Bench) -> Iterator[tuple[Row, bool]]:
    """One row for each of our jobs, and whether it came from the cache."""
    code = code_hash()
    for job in our_jobs(bench.source, bench.panels, bench.quick):
        row, old = our_row(bench, job, code)
        yield {key: value for key, value in job.items() if key not in ("recipe", "budget")} | row | bench.sizes(row, job["panel"]), old


def our_row(bench: Bench, job: Job, code: str) -> tuple[Row, bool]:
    """What a job comes to with the code of this hash, and whether it was kept."""
    full = {**job, "model": str(bench.model), "data": bench.data, "rows": bench.rows, "threads": bench.threads}

    def make() -> Row:
        # the folder is this process's, so that it goes even where the other one is killed
        with tempfile.TemporaryDirectory(prefix="laconic-bench-") as scratch:
            made = alone(make_ours, full | {"scratch": scratch})
        # a row computed while the code was edited belongs to neither version
        return made if code_hash() == code else made | {"final": False}

    return bench.cached(our_key(bench, job, code), "ours", make)


def our_key(bench: Bench, job: Job, code: str) -> str:
    """The name of our cached row."""
    return key_of("ours", bench.identity(), code, job)


def confirmed(bench: Bench, rows: Sequence[Row]) -> dict[str, Row]:
    """Our rows of an earlier table by the keys of the code as it is, after that code made the witnesses again; empty where one differs.

    A refactor changes the code's hash, not its figures; whether it did not is measured, on the rows that cover the most code."""
    code = code_hash()
    earlier = {(row["panel"], row["setting"], row["command"]): row for row in rows if is_ours(row["tool"]) and "kl_mean" in row}
    jobs = {(job["panel"], job["setting"]): job for job in our_jobs(bench.source, bench.panels, bench.quick)}
    if missing := [f"{setting}, panel {panel}" for panel, setting in WITNESSES if (panel, setting) not in jobs]:
        say(f"a table without {'; '.join(missing)} cannot be confirmed")
        return {}
    found: dict[str, Row] = {}
    for place, job in jobs.items():
        kept = earlier.get((*place, job["command"]))
        if kept is None:
            say(f"panel {place[0]} {place[1]} is not in the kept table, so there is nothing to confirm it by")
            continue
        key = our_key(bench, job, code)
        if place not in WITNESSES:
            found[key] = kept | {"key": key, "confirmed": True}
            continue
        row, _ = our_row(bench, job, code)
        if unlike := [name for name in FIGURES if row.get(name) != kept.get(name)]:
            said = "; ".join(f"{name} {row.get(name)}, was {kept.get(name)}" for name in unlike)
            say(f"panel {place[0]} {place[1]} comes out otherwise with this code: {said}")
            return {}
        say(f"panel {place[0]} {place[1]}: the same to the last digit")
        found[key] = {name: value for name, value in kept.items() if name != "confirmed"} | row
    return found


def peer_rows(bench: Bench, peer: Peer, tokens: Path) -> Iterator[tuple[Row, bool]]:
    """One row for each setting and panel of a peer."""
    runs = peer.runs(bench.panels, bench.quick)
    keys = [key_of("peer", bench.identity(), peer.version(), peer.script_hash(), shown(peer, run)) for run in runs]
    if not peer.python().exists() and not any(bench.holds(key) for key in keys):
        reason = f"{ABSENT}; run bench/peers/install.sh {peer.name}"
        for panel in bench.panels:
            yield {"panel": panel, "tool": peer.name, "setting": "all", "command": "", "reason": reason}, False
        return
    for run, key in zip(runs, keys, strict=True):
        row, old = bench.cached(key, peer.name, partial(evaluated, bench, peer, run, tokens))
        for panel in run.panels:
            setting = f"{run.setting}, embedding in 16 bits" if panel == "b" and not peer.whole else run.setting
            yield {"panel": panel, "tool": peer.name, "setting": setting, "command": shown(peer, run)} | row | bench.sizes(row, panel), old


def evaluated(bench: Bench, peer: Peer, run: Run, tokens: Path) -> Row:
    """A peer's result, measured by our own evaluator on the test rows."""
    if not peer.python().exists():
        return {"reason": f"{ABSENT}; run bench/peers/install.sh {peer.name}", "final": False}
    from laconic.core.errors import BrokenPromise, UserError
    from laconic.job import quality_of
    from laconic.models import open_model
    from laconic.pipeline import batch_of

    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as scratch:
        out = Path(scratch) / "out"
        record = run_peer(peer, run, bench.model, tokens, out, bench.threads)
        if "reason" in record:
            return record
        try:
            found = quality_of(bench.source, open_model(out), bench.split.certify, metric=bench.split.metric, batch=batch_of(bench.source))
        except (BrokenPromise, UserError) as error:
            return {"reason": f"its result cannot be measured: {error}", "final": False}
    bits, group, skipped = record.get("bits_nominal"), record.get("group"), record.get("skipped_layers", [])
    # a tool that knows what its codes need without padding says so; of the others it follows from bits, group and zeros
    least = record.get("bytes_linears_ideal", record["bytes_linears"])
    if "bytes_linears_ideal" not in record and not peer.types and bits and group:
        names = [f"{name}.weight" for name in skipped]
        least = least_bytes(least, linears_of(bench.source), names, int(bits), int(group), bool(record.get("symmetric")))
    keep = ("version", "torch", "bytes_linears", "bytes_file", "bytes_tensors", "skipped_layers", "seconds_cpu", "peak_memory_bytes")
    return {
        **{key: record[key] for key in keep if key in record},
        "detail": record.get("setting", ""),
        "bytes_linears_least": least,
        "seconds": record["seconds_wall"],
        **_measured(found),
    }


def described(row: Row) -> str:
    """A row as a line of progress."""
    head = f"panel {row['panel']} {title(row['tool'])}, {row['setting']}"
    if "reason" in row:
        return f"{head}: {row['reason']}"
    fallen = ", collapsed" if row.get("collapsed") else ""
    return (
        f"{head}: KL {row['kl_mean']:.4g}, perplexity {row['perplexity']:.4g}, top-1 {row['top1_agreement']:.1%}{fallen}, "
        f"{row['bits']:.3f} bits ({row['bits_stored']:.3f} stored), {row['seconds']:.0f} s, {row['peak_memory_bytes'] / 1e6:.0f} MB"
    )


def collect(bench: Bench, peers: Sequence[str], tokens: Path) -> list[Row]:
    """All rows, ours first."""
    chosen = [TABLE[name] for name in peers]
    jobs = len(our_jobs(bench.source, bench.panels, bench.quick))
    total = jobs + sum(len(p.runs(bench.panels, bench.quick)) for p in chosen if p.python().exists())
    say(f"{jobs} runs of ours, {total - jobs} of {', '.join(peers) or 'no peer'}")
    rows: list[Row] = []

    def take(made: Iterator[tuple[Row, bool]]) -> None:
        for row, old in made:
            rows.append(row)
            say(f"[{len(rows)}] {described(row)}{' (kept)' if old else ''}")

    take(our_rows(bench))
    for peer in chosen:
        take(peer_rows(bench, peer, tokens))
    return rows


def result_of(bench: Bench, peers: Sequence[str], rows: list[Row]) -> dict[str, Any]:
    """quality.json."""
    from laconic.job import versions
    from laconic.measurement import hardware

    training = bench.model / "training.json"
    seen = json.loads(training.read_text(encoding="utf-8")).get("tokens") if training.is_file() else None
    found = {f"{row['tool']}": row["version"] for row in rows if "version" in row}
    originals = [row["perplexity_original"] for row in rows if "perplexity_original" in row]
    samples = {part: getattr(bench.split, part) for part in ("calibrate", "search", "certify")}
    model = {
        "name": bench.model.name,
        "hash": bench.hash,
        "parameters": bench.source.parameters,
        "linears": sum(n * m for n, m in linears_of(bench.source).values()),
    }
    return {
        "format": 1,
        "model": model | ({"tokens_seen": seen} if seen is not None else {}),
        "code": code_hash(),
        "evaluator": evaluator_hash(),
        "scripts": {name: TABLE[name].script_hash() for name in peers},
        "data": {"length": bench.split.certify.length} | {p: {"rows": s.inputs.shape[0], "sha256": s.sha256} for p, s in samples.items()},
        "rows_asked": bench.rows,
        "quick": bench.quick,
        "panels": list(bench.panels),
        "peers": list(peers),
        "perplexity_original": originals[0] if originals else None,
        "versions": versions() | found,
        "hardware": hardware(),
        "command": "python -m bench.quality",
        "confirmed": [f"{setting}, panel {panel}" for panel, setting in WITNESSES] if any("confirmed" in row for row in rows) else [],
        "rows": rows,
    }


# ---- the gate


def stale(file: Path, model: Path) -> list[str]:
    """Why a kept table does not stand for the code and the model as they are; empty where it does."""
    if not file.is_file():
        return [f"{file} does not exist"]
    kept = json.loads(file.read_text(encoding="utf-8"))
    reasons = []
    if kept["model"]["hash"] != model_hash(model):
        reasons.append(f"the model at {model.name} is another than the table's")
    if kept["code"] != code_hash():
        reasons.append("quality-relevant code has changed (core, kernels, methods, recipes, calibration, pipeline)")
    if kept["evaluator"] != evaluator_hash():
        reasons.append("the evaluator has changed")
    if kept["quick"] or kept["rows_asked"] < ROWS:
        reasons.append(f"the table is a reduced run ({kept['rows_asked']} rows{', quick' if kept['quick'] else ''})")
    if missing := set(PANELS) - set(kept["panels"]):
        reasons.append(f"panel {', '.join(sorted(missing))} is missing")
    if missing := set(TABLE) - set(kept["peers"]):
        reasons.append(f"{', '.join(sorted(missing))} left out")
    reasons += [
        f"the script of {title(name)} has changed"
        for name, hashed in kept["scripts"].items()
        if name in TABLE and hashed != TABLE[name].script_hash()
    ]
    # what a peer says of itself stands; that nobody installed it does not
    absent = {row["tool"] for row in kept["rows"] if row.get("reason", "").startswith(ABSENT)}
    reasons += [f"{title(name)} was not installed" for name in sorted(absent)]
    if pending := sum(row.get("reason") == PENDING for row in kept["rows"]):
        reasons.append(f"{pending} rows were not run yet")
    if ahead(kept["rows"]) and not (file.parent / "why.md").is_file():
        reasons.append(f"a peer is ahead and {file.parent / 'why.md'} does not say why")
    return reasons


# ---- the command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="laconic against other tools, on one model and one text")
    parser.add_argument("--model", default=None, type=Path, help="a Hugging Face folder (the embedded model)")
    parser.add_argument("--panel", default="both", choices=(*PANELS, "both"))
    parser.add_argument("--peers", default=",".join(TABLE), help="names with commas between, or none")
    parser.add_argument("--rows", default=ROWS, type=int, help="calibration rows; half as many are tested on")
    parser.add_argument("--out", default=RESULTS / "quality.json", type=Path, help="quality.md is written beside it")
    parser.add_argument("--quick", action="store_true", help="the first point, one setting a peer")
    parser.add_argument("--tokens", default=None, type=Path, help="keep the calibration tokens in this .npy file")
    parser.add_argument("--make", default=f"ours,{','.join(TABLE)}", help="whose rows to make where they are not kept; the rest waits")
    parser.add_argument("--kept", action="store_true", help="write the table of the rows that are kept, without making any")
    parser.add_argument(
        "--confirm", action="store_true", help="keep our rows of earlier code where this code makes the witnesses among them the same"
    )
    parser.add_argument("--threads", default=os.cpu_count() or 1, type=int, help="threads that each row's tool may use")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the kept table is stale")
    parser.add_argument("--data", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default=RESULTS / ".cache", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    found.make = [] if found.kept else found.make.split(",")
    if unknown := [name for name in found.make if name not in ("ours", *TABLE)]:
        parser.error(f"unknown tool {', '.join(unknown)} in --make; known are ours, {', '.join(TABLE)}")
    found.peers = [] if found.peers == "none" else [name for name in found.peers.split(",") if name]
    if unknown := [name for name in found.peers if name not in TABLE]:
        parser.error(f"unknown peer {', '.join(unknown)}; known are {', '.join(TABLE)} and none")
    if found.rows < 2:
        parser.error(f"--rows {found.rows}: at least 2 are needed")
    if found.model is None:
        from laconic.zoo import nano

        found.model = nano.path()
    if not (found.model / "config.json").is_file():
        parser.error(f"{found.model} holds no config.json; --model takes a Hugging Face folder")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or checks; the exit code."""
    args = arguments(argv)
    # what peers store is measured by torch's products of dense matrices, and so is ours: the native ones differ in the 8th digit
    os.environ["LACONIC_KERNELS"] = "reference"
    if args.check:
        reasons = stale(args.out, args.model)
        for reason in reasons:
            say(f"stale: {reason}")
        say("the quality table is stale; run `python -m bench.quality`" if reasons else "the quality table fits the code and the model")
        return int(bool(reasons))
    import numpy as np

    model = args.model.resolve()
    source, split = open_all(str(model), args.data, args.rows)
    panels = tuple(PANELS) if args.panel == "both" else (args.panel,)
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"rows": []}
    by_key = {row["key"]: row for row in before["rows"] if "key" in row}
    bench = Bench(
        model, args.data, args.rows, args.quick, panels, source, split, args.cache, model_hash(model), by_key, args.make, args.threads
    )
    code = code_hash()
    if args.confirm:
        same = before.get("model", {}).get("hash") == bench.hash and before.get("evaluator") == evaluator_hash()
        moved = confirmed(replace(bench, make=["ours"]), before["rows"]) if same else {}
        if not moved:
            say("nothing is kept: our rows must be made again" if same else "the model or the evaluator is another: make the rows again")
            return 1
        bench = replace(bench, earlier={**by_key, **moved})
    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as scratch:
        tokens = (args.tokens or Path(scratch) / "tokens.npy").resolve()
        np.save(tokens, split.calibrate.inputs.numpy())
        rows = collect(bench, args.peers, tokens)
    if (model_hash(model), code_hash()) != (bench.hash, code):
        say("the model or the code changed while the table was made, so nothing is written; run again")
        return 1
    result = result_of(bench, args.peers, rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    why = args.out.parent / "why.md"
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(result, why.read_text(encoding="utf-8") if why.is_file() else None)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    say(f"{args.out} and {args.out.with_suffix('.md').name} are written")
    for row in rows:
        if is_ours(row["tool"]) and row["tool"] != BASELINE and "reason" in row:
            say(f"no row: {described(row)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it stood")
        sys.exit(130)
