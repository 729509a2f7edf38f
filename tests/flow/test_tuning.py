"""Tuning the whole model: the output comes nearer to the original's, bytes stay, a cut run ends as a calm one, harm is not kept."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laconic import pipeline
from laconic.core.errors import UserError
from laconic.core.site import Linear, Site, TensorId
from laconic.data import open_data
from laconic.job import compress
from laconic.kernels.grids import Grid
from laconic.kernels.losses import Divergence
from laconic.methods.quantize.grid.grouped import Stepped
from laconic.methods.quantize.round.adaround import AdaRound
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.train.straight import Straight, rewritten
from laconic.models import open_model
from laconic.recipe import Choice, Recipe, check
from laconic.tuning import shuffled, tune


@pytest.fixture(scope="module")
def small(tiny) -> tuple[Path, Path]:
    """A Llama of 2 layers with large weights, so that rounding them is felt, and text for it."""
    return tiny(layers=2, blocks=400, initializer_range=0.2)


def recipe(tune: str | None) -> Recipe:
    choice = Choice(method="quantize.round.rtn", levels=({"bits": 2, "group": 16},))
    return Recipe(name="two", search="search.allocate.uniform", judge=False, tune=tune, choices=(choice,))


def run(small, out: Path, tune: str | None, **more) -> dict:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(32, 8, 8))
    return compress(source, split, budget=["bits=8"], recipe=recipe(tune), out=out, log=lambda _: None, **more)


LEARNED = "quantize.train.straight(steps=60, rates=(('position', 1e-2), ('step', 5e-3)))"


def test_tuning_brings_the_output_nearer_in_the_same_bytes(small, tmp_path):
    plain, tuned = run(small, tmp_path / "plain", None), run(small, tmp_path / "tuned", LEARNED)
    assert tuned["quality"]["kl_mean"] < 0.8 * plain["quality"]["kl_mean"]
    assert tuned["bytes"] == plain["bytes"]
    first, second = (json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("plain", "tuned"))
    assert first == second
    plan = json.loads((tmp_path / "tuned" / "plan.json").read_text())
    assert [entry["plan"] for entry in plan["judged"]] == ["solved", "tuned"]
    assert any("tuned over 60 steps" in note for note in plan["notes"])


def test_the_same_seed_gives_the_same_bytes_and_a_cut_run_too(small, tmp_path):
    calm = run(small, tmp_path / "calm", LEARNED)

    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int, note: str) -> None:
        if stage == "tuning" and done == 20:
            raise Cut

    seen: list[str] = []
    with pytest.raises(Cut):
        run(small, tmp_path / "out", LEARNED, progress=cut)
    again = run(small, tmp_path / "out", LEARNED, progress=lambda stage, done, total, note: seen.append(stage))
    assert again["files"] == calm["files"]
    assert "compressing" not in seen and "tuning" in seen


def test_harm_is_not_kept(small, tmp_path):
    plain = run(small, tmp_path / "plain", None)
    wild = run(small, tmp_path / "wild", "quantize.train.straight(steps=3, rates=(('position', 50.0), ('step', 5.0)))")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "wild")]
    assert weights[0] == weights[1] and wild["quality"]["kl_mean"] == plain["quality"]["kl_mean"]
    assert any("did not lower KL" in note for note in json.loads((tmp_path / "wild" / "plan.json").read_text())["notes"])


def test_what_is_too_large_is_left_out_aloud(small, tmp_path, monkeypatch):
    from laconic import job

    monkeypatch.setattr(job, "TUNABLE", 1000)
    said = []
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=32, limits=(8, 4, 8))
    compress(source, split, budget=["bits=8"], recipe=recipe(LEARNED), out=tmp_path / "out", log=said.append)
    assert any("was left out" in line and "1,000 weights" in line for line in said)

    from laconic.core.errors import UserError

    with pytest.raises(UserError, match="is no lesson"):
        check(recipe("quantize.round.rtn"))


@pytest.mark.parametrize("optimiser", ["adam", "signed"])
def test_only_what_a_lesson_names_is_learned(optimiser):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 48), torch.randn(8, 64, 48) @ torch.randn(48, 48) / 7
    batches = x.split(2)
    targets = [batch @ weight.T for batch in batches]

    def run_batch(i: int, weights) -> Tensor:
        return batches[i] @ weights["layer"].T

    site = Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (32, 48))
    (held,) = RTN()(site, {"weight": weight}, {}, Grid(2, 16)).hold.values()
    soft = held.soften(weight)
    assert isinstance(soft, Stepped)
    lesson = Straight(rates=(("position", 5e-3),), steps=200, optimiser=optimiser)
    losses = tune(run_batch, targets, {"layer": soft}, lesson, generator=torch.Generator().manual_seed(0))
    assert len(losses) == 200 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    # nothing else has moved
    assert float(soft.step.detach().abs().sum()) == 0
    assert torch.equal(soft.harden().scales, held.scales)
    assert not torch.equal(soft.harden().codes, held.codes)


def test_rows_at_once_keep_their_logits_small(small):
    source = open_model(small[0])
    rows, wide = torch.zeros(8, 1024, dtype=torch.int64), 4 * 1024 * source.config.vocab_size
    limit = pipeline.LOGITS
    assert pipeline.at_once(source, rows, 6) == max(n for n in (1, 2, 3, 6) if n == 1 or n * wide <= limit)
    assert pipeline.at_once(source, torch.zeros(8, limit // wide * 1024 // 3, dtype=torch.int64), 8) == 2
    assert pipeline.at_once(source, torch.zeros(1, 2 * limit // source.config.vocab_size, dtype=torch.int64), 4) == 1


@pytest.mark.parametrize("lesson", [Straight(steps=30), AdaRound(steps=30)], ids=["without penalties", "with penalties"])
def test_batches_one_after_another_are_one_large_batch(lesson):
    weight, x = (
        torch.randn(6, 16, generator=torch.Generator().manual_seed(0)),
        torch.randn(10, 5, 16, generator=torch.Generator().manual_seed(1)),
    )
    (held,) = RTN()(Site("a", Linear(), {"weight": TensorId("a.weight")}, (6, 16)), {"weight": weight}, {}, Grid(2, 8)).hold.values()

    def learned(size: int, together: int) -> tuple[list[float], Tensor]:
        batches = x.split(size)
        soft = lesson.soften(held, weight)
        losses = tune(
            lambda i, weights: batches[i] @ weights["a"].T, [b @ weight.T for b in batches], {"a": soft}, lesson,
            generator=torch.Generator().manual_seed(2), together=together,
        )  # fmt: skip
        return losses, soft.dense().detach()

    # the last step of a pass has two rows, not four
    whole, apart = learned(4, 1), learned(1, 4)
    torch.testing.assert_close(torch.tensor(whole[0]), torch.tensor(apart[0]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole[1], apart[1], rtol=1e-5, atol=1e-5)


def test_the_divergence_is_that_of_torch_and_masks_count_nothing():
    output, target = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.rand(3, 5) > 0.4
    each = nn.functional.kl_div(output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(Divergence()(output, target, None), each.mean())
    torch.testing.assert_close(Divergence()(output, target, mask), each[mask].mean())
    assert float(Divergence()(target, target, None)) == pytest.approx(0, abs=1e-6)


def test_defaults_are_those_of_the_docstring():
    assert (Straight().steps, Straight().batch, dict(Straight().rates)) == (128, 4, {"position": 5e-3, "step": 3e-3, "table": 1e-2})


def test_copies_hold_what_the_original_would_have_written():
    tokens = torch.arange(10)
    logits = torch.full((10, 20), -1e9)
    # behind token i the original predicts 10 + i, and nothing else
    logits[torch.arange(10), torch.arange(10) + 10] = 0
    draw = torch.Generator().manual_seed(0)
    made = rewritten(tokens, logits, 200, 0.3, draw)
    assert made.shape == (200, 10) and made.dtype == tokens.dtype and bool((made[:, 0] == 0).all())
    changed = made != tokens
    assert torch.equal(made[changed], (torch.arange(10) + 9).expand(200, 10)[changed])
    assert 0.25 < float(changed[:, 1:].float().mean()) < 0.35
    assert torch.equal(rewritten(tokens, logits, 2, 0.0, draw), tokens.expand(2, 10))


@pytest.mark.parametrize(("steps", "room", "rows"), [(10, 100, 16), (100, 100, 16), (100, 3, 3), (3, 100, 4), (2, 100, 0), (100, 0, 0)])
def test_there_are_as_many_copies_as_asked_for_seen_and_kept(steps, room, rows):
    inputs, asked = torch.zeros(8, 10, dtype=torch.int64), []

    def predictions():
        asked.append(1)
        return iter(torch.zeros(8, 10, 20).split(4))

    made = Straight(steps=steps, batch=4).varied(inputs, predictions, room, torch.Generator().manual_seed(0))
    assert len(made) == rows
    # predictions are not made for nothing, and every row has a copy before one has two
    assert len(asked) == (rows > 0)
    assert len(Straight(copies=0).varied(inputs, predictions, room, torch.Generator())) == 0
    with pytest.raises(ValueError, match="the share of new tokens is 0 to 1"):
        Straight(replaced=2)


def test_batches_are_drawn_each_once_a_pass():
    drawn = list(islice(shuffled(5, torch.Generator().manual_seed(0)), 15))
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert drawn[:5] != drawn[5:10]


def test_rates_for_nothing_that_is_learned_are_refused(small, tmp_path):
    with pytest.raises(UserError, match="Straight has rates for s2, but what can be learned here is position, step"):
        run(small, tmp_path / "out", "quantize.train.straight(steps=2, rates=(('s2', 1e-2),))")


@dataclass(frozen=True)
class Seeing(Divergence):
    """KL, with the dtypes of what it is given."""

    seen: set[torch.dtype] = field(default_factory=set, compare=False)

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        self.seen.add(output.dtype)
        return super().__call__(output, target, mask)


@pytest.mark.parametrize(("lesson", "quick", "dtype"), [(Straight, True, torch.bfloat16), (Straight, False, torch.float32),
                                                        (AdaRound, True, torch.float32)])  # fmt: skip
def test_products_are_narrow_where_a_lesson_allows_it_and_the_processor_is_faster_so(small, monkeypatch, lesson, quick, dtype):
    monkeypatch.setattr("laconic.kernels.pairs.pairs", lambda: quick)
    source = open_model(small[0])
    model = source.load(torch.float32)
    site = next(site for part in source.anatomy.segments() if part.name for site in part.sites)
    name = site.tensors["weight"].name
    (form,) = RTN()(site, {"weight": source.read(name).float()}, {}, Grid(3, 16)).hold.values()
    inputs = torch.randint(1, 4096, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        targets = [model(inputs).logits]
    seeing = Seeing()
    learned, losses = pipeline.learn(source, model, {name: form}, [inputs], targets, lesson(objective=seeing, steps=2), seed=0)
    assert seeing.seen == {dtype} and len(losses) == 2
    # what is learned and stored is not
    assert learned[name].dense().dtype == torch.float32


def test_lanes_add_up_to_the_same_whatever_ends_first():
    weight, x = torch.randn(6, 16), torch.randn(12, 5, 16)
    (held,) = RTN()(Site("a", Linear(), {"weight": TensorId("a.weight")}, (6, 16)), {"weight": weight}, {}, Grid(2, 8)).hold.values()
    seen = set()

    def learned(lanes: int, slow: int = -1) -> tuple[list[float], Tensor]:
        batches, soft = x.split(2), Straight().soften(held, weight)

        def run_batch(i: int, weights) -> Tensor:
            seen.add(threading.get_ident())
            time.sleep(0.005 * (i % 3 == slow))
            return batches[i] @ weights["a"].T

        losses = tune(
            run_batch, [b @ weight.T for b in batches], {"a": soft}, Straight(steps=12),
            generator=torch.Generator().manual_seed(2), together=3, lanes=lanes,
        )  # fmt: skip
        return losses, soft.dense().detach()

    cores = torch.get_num_threads()
    one, three, again = learned(1), learned(3, 0), learned(3, 2)
    assert len(seen) > 1 and torch.get_num_threads() == cores
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(three[0]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one[1], three[1], rtol=1e-5, atol=1e-5)
    assert three[0] == again[0] and torch.equal(three[1], again[1])


def test_a_model_tuned_by_several_threads_is_the_same_each_time(small, tmp_path):
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert pipeline.abreast(open_model(small[0]), 4) == 2
        first, second = (run(small, tmp_path / name, LEARNED)["files"] for name in ("one", "two"))
    finally:
        torch.set_num_threads(cores)
    assert first["model.safetensors"] == second["model.safetensors"]
