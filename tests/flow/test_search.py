"""Plans that are measured: forms kept from pricing are switched in, a killed search goes on, and the whole recipe runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laconic import artifact, trials
from laconic.core.menu import Plan
from laconic.core.packed import below, restore
from laconic.data import open_data
from laconic.job import compress, identity_of
from laconic.journal import Work
from laconic.kernels.losses import Divergence
from laconic.measurement import compare, outputs
from laconic.models import open_model
from laconic.pipeline import make_plan, price, quiet
from laconic.pipeline import trials as trials_of
from laconic.recipe import load_recipe

RECIPE = """
search: search.evolve.evopress(start=search.allocate.uniform, generations=4, offspring=4, survivors=(2, 1), rows=(1, 3))
choices:
  - method: quantize.round.gptq
    levels: [{bits: 8, group: 16}, {bits: 4, group: 16}, {bits: 3, group: 16}, {bits: 2, group: 16}]
"""

CHILD = """
import os, signal, sys, torch
from pathlib import Path
from laconic.data import open_data
from laconic.job import compress
from laconic.models import open_model
from laconic.recipe import load_recipe
torch.set_num_threads(1)
model, text, out, recipe, stop = sys.argv[1:]
def progress(stage, done, total, note):
    if stage == "searching" and done == int(stop):
        os.kill(os.getpid(), signal.SIGKILL)
source = open_model(model)
split = open_data(text, source, seed=0, length=32, limits=(8, 4, 8))
compress(source, split, budget=["bits=5"], recipe=load_recipe(recipe), out=Path(out), progress=progress, log=lambda line: None)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "short.yaml"
    path.write_text(RECIPE)
    return str(path)


def opened(small):
    source = open_model(small[0])
    return source, open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))


def run(small, out: Path, recipe: str, **more):
    source, split = opened(small)
    return compress(source, split, budget=["bits=5"], recipe=load_recipe(recipe), out=out, log=lambda _: None, **more)


def test_the_recipe_runs_and_keeps_its_promises(small, tmp_path, recipe):
    out, seen = tmp_path / "out", []
    certificate = run(small, out, recipe, progress=lambda *now: seen.append(now))
    assert [now[1:3] for now in seen if now[0] == "searching"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert artifact.bytes_of(out) == certificate["bytes"] <= 5 * open_model(small[0]).parameters / 8
    plan = json.loads((out / "plan.json").read_text())
    judged = {entry["plan"]: entry["kl"] for entry in plan["judged"]}
    taken = "uniform" if any("uniform plan was taken" in note for note in plan["notes"]) else "solved"
    assert judged[taken] == min(judged.values())
    assert len({json.dumps(choice["level"]) for choice in plan["choices"]}) > 1 or taken == "uniform"
    artifact.verify_hashes(out)


def test_a_trial_is_the_model_with_those_forms(small, tmp_path, recipe, monkeypatch):
    """Of plans that begin alike, that differ in the table, and on part of the rows: as the whole model says that holds them."""
    source, split = opened(small)
    wanted = load_recipe(recipe)
    with Work(tmp_path / "out", identity_of(source, split, wanted, ["bits=5"], 0, None, "cpu")) as work:
        rows, _ = price(source, split.calibrate.inputs, wanted, seed=0, work=work, progress=quiet, batch=8, keep=True)
        by_site: dict[str, list] = {}
        for row in rows:
            by_site.setdefault(row.site, []).append(row)
        coarse = {site: some[-1] for site, some in by_site.items()}
        plans = [
            coarse,
            coarse | {"model.layers.2.mlp.down_proj": by_site["model.layers.2.mlp.down_proj"][0]},
            coarse | {"model.embed_tokens": by_site["model.embed_tokens"][0]},
            {site: some[0] for site, some in by_site.items()},
            coarse,
        ]
        judge = trials_of(source, split.search.inputs, Divergence(), work)
        assert judge.rows == 4
        for part in (None, [1, 3]):
            found = judge([Plan(tuple(plan.values()), 0, coarse["model.embed_tokens"].damage) for plan in plans], part)
            for plan, damage in zip(plans, found, strict=True):
                model = source.load(torch.float32)
                for row in plan.values():
                    key = trials.form_key(row)
                    (name,) = row.covers
                    form = restore(work.done(key)["forms"][name], below(work.tensors(key), name))
                    model.get_parameter(name).data.copy_(form.dense())
                samples = split.search._replace(inputs=split.search.inputs[list(range(4)) if part is None else part])
                kl = compare(outputs(source.load(torch.float32)), outputs(model), samples).kl.mean()
                assert damage.value == pytest.approx(float(kl), rel=2e-3, abs=1e-6)
            assert found[0] == found[4]
            assert found[3].value < found[0].value
        # plans that do not fit beside each other go one after another, and say the same
        monkeypatch.setattr(trials, "HELD", 1)
        alone = judge([Plan(tuple(plan.values()), 0, coarse["model.embed_tokens"].damage) for plan in plans], [1, 3])
        assert alone == found


def test_what_begins_alike_is_run_once(small, tmp_path, recipe, monkeypatch):
    source, split = opened(small)
    wanted = load_recipe(recipe)
    with Work(tmp_path / "out", identity_of(source, split, wanted, ["bits=5"], 0, None, "cpu")) as work:
        rows, _ = price(source, split.calibrate.inputs, wanted, seed=0, work=work, progress=quiet, batch=8, keep=True)
        by_site: dict[str, list] = {}
        for row in rows:
            by_site.setdefault(row.site, []).append(row)
        plan = {site: some[0] for site, some in by_site.items()}
        other = plan | {"model.layers.1.mlp.up_proj": by_site["model.layers.1.mlp.up_proj"][1]}
        judge = trials_of(source, split.search.inputs, Divergence(), work)
        damage = rows[0].damage
        judge([Plan(tuple(plan.values()), 0, damage)])
        layers = []
        run_through = trials.Walk._through

        def counted(self, module, segment, i):
            layers.append((segment.name, i))
            return run_through(self, module, segment, i)

        monkeypatch.setattr(trials.Walk, "_through", counted)
        judge([Plan(tuple(one.values()), 0, damage) for one in (plan, other, plan)], [0])
        # the third is the first; the second parts from it in layer 1
        assert layers == [("model.layers.0", 0), ("model.layers.1", 0), ("model.layers.1", 1), ("model.layers.2", 0), ("model.layers.2", 1)]


def test_killed_between_generations_it_ends_the_same(small, tmp_path, recipe, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calm = run(small, tmp_path / "calm" / "out", recipe)
        for stop in (1, 3):
            command = [sys.executable, str(script), *map(str, small), str(out), recipe, str(stop)]
            assert subprocess.run(command, env=env, check=False).returncode == -9
        journal = (out.parent / ".out.laconic" / "journal.jsonl").read_text().splitlines()
        keys = [json.loads(line)["entry"]["key"] for line in journal]
        assert len(keys) == len(set(keys))
        # two steps a generation, and the start is not judged
        assert sum(key.startswith("search/") for key in keys) == 6
        calls = []
        judged = trials.Trials.__call__
        monkeypatch.setattr(trials.Trials, "__call__", lambda self, plans, part=None: calls.append(part) or judged(self, plans, part))
        again = run(small, out, recipe)
        # the fourth generation and the last comparison over all rows
        assert len(calls) == 3 and calls[-1] is None
    finally:
        torch.set_num_threads(threads)
    assert again["files"] == calm["files"]
    assert again["plan_sha256"] == calm["plan_sha256"]


def test_a_search_that_does_not_ask_keeps_no_forms(small, tmp_path):
    source, split = opened(small)
    wanted = load_recipe("auto")
    with Work(tmp_path / "out", identity_of(source, split, wanted, ["bits=5"], 0, None, "cpu")) as work:
        make_plan(source, split, wanted, ["bits=5"], seed=0, work=work, log=lambda _: None)
        assert not [key for key in work._entries if key.startswith(("form/", "search/"))]


def test_a_damaged_form_is_made_again(small, tmp_path, recipe):
    source, split = opened(small)
    wanted = load_recipe(recipe)
    identity = identity_of(source, split, wanted, ["bits=5"], 0, None, "cpu")
    with Work(tmp_path / "out", identity, log=lambda _: None) as work:
        plan = make_plan(source, split, wanted, ["bits=5"], seed=0, work=work, log=lambda _: None)
        key = next(key for key in work._entries if key.startswith("form/"))
        part = work.folder / "parts" / work._entries[key].file
    before = part.read_bytes()
    part.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with Work(tmp_path / "out", identity, log=lambda _: None) as work:
        assert make_plan(source, split, wanted, ["bits=5"], seed=0, work=work, log=lambda _: None) == plan
        assert part.read_bytes() == before
