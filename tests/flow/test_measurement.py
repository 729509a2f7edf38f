"""Quality, speed and memory on real models, against numbers found another way."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic import measurement, models
from laconic.core.errors import BrokenPromise, UserError
from laconic.data import Samples, open_data
from laconic.measurement import Quality, compare, outputs, summarize

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LACONIC_DATA", ROOT.parent / "shared" / "data"))
KEYS = {"unit", "n", "low", "high", "spread"}


def llama(seed: int = 0, vocabulary: int = 97) -> nn.Module:
    """A small Llama with random weights, sharp enough that its predictions differ from even."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=True, **shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model.requires_grad_(False)


def noisy(model: nn.Module, size: float, seed: int = 1) -> nn.Module:
    """A copy whose matrices are off by noise of a share `size` of their own deviation."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    for p in other.parameters():
        if p.ndim > 1:
            p.add_(torch.randn(p.shape, generator=g) * p.std() * size)
    return other


def rows(count: int = 12, length: int = 24, vocabulary: int = 97) -> Samples:
    tokens = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(5))
    return Samples(tokens, None, length, count, "")


def test_a_model_against_itself() -> None:
    model, samples = llama(), rows()
    quality = compare(outputs(model), outputs(copy.deepcopy(model)), samples, batch=3)
    assert quality.kl.shape == (12, 23) and bool((quality.kl == 0).all()) and bool(quality.top1.all())
    found = summarize(quality, metric="kl")
    assert found["kl_mean"] == found["kl_mean_low"] == found["kl_mean_high"] == found["kl_p999"] == 0
    assert found["top1_agreement"] == 1 and found["perplexity"] == found["perplexity_original"] and found["perplexity_p_value"] == 1
    assert "collapsed" not in found and "accuracy" not in found


def test_batches_and_progress_change_nothing() -> None:
    model, samples = llama(), rows()
    other = noisy(model, 0.05)
    seen: list[tuple[int, int]] = []
    one = compare(outputs(model), outputs(other), samples, batch=1)
    five = compare(outputs(model), outputs(other), samples, batch=5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    for a, b in zip(one[:3], five[:3], strict=True):
        # the matrix products of another batch size round otherwise, by 1e-7 of the logits
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(one.top1, five.top1)


def test_numbers_are_those_of_torch_and_transformers() -> None:
    model, samples = llama(), rows()
    other = noisy(model, 0.1)
    found = summarize(compare(outputs(model), outputs(other), samples), metric="kl")
    with torch.no_grad():
        p, q = model(samples.inputs).logits[:, :-1], other(samples.inputs).logits[:, :-1]
        mine = F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="none").sum(-1)
        assert found["perplexity"] == pytest.approx(math.exp(other(samples.inputs, labels=samples.inputs).loss), rel=1e-5)
        assert found["perplexity_original"] == pytest.approx(math.exp(model(samples.inputs, labels=samples.inputs).loss), rel=1e-5)
    assert found["kl_mean"] == pytest.approx(mine.mean().item(), rel=1e-4)
    flat = mine.reshape(-1).sort().values
    for key, share in (("kl_median", 0.5), ("kl_p95", 0.95), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        assert found[key] == pytest.approx(flat[math.ceil(share * len(flat)) - 1].item(), rel=1e-3)
        assert found["details"][key]["low"] <= found[key] <= found["details"][key]["high"]
    assert found["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found["kl_mean_low"] < found["kl_mean"] < found["kl_mean_high"]
    assert set(found) - {"details"} == set(found["details"]) | {"kl_mean_low", "kl_mean_high"}
    assert all(set(entry) >= KEYS for entry in found["details"].values())
    assert json.loads(json.dumps(found)) == found, "plain numbers only"
    assert summarize(compare(outputs(model), outputs(other), samples), metric="kl") == found
    # one sequence has no interval, and none is made up
    alone = summarize(compare(outputs(model), outputs(other), rows(1)), metric="kl")
    assert "kl_mean_low" not in alone and "low" not in alone["details"]["kl_mean"] and alone["perplexity_p_value"] == 1


def test_a_ruined_model_is_called_collapsed() -> None:
    model = llama()
    found = summarize(compare(outputs(model), lambda tokens: outputs(model)(tokens).roll(1, -1), rows()), metric="kl")
    assert found["collapsed"] is True and found["top1_agreement"] < 0.25 and found["kl_mean"] > 1


def test_outputs_that_are_not_finite() -> None:
    model, samples = llama(), rows()
    ruined = copy.deepcopy(model)
    ruined.model.layers[1].mlp.down_proj.weight[3, 4] = math.nan
    with pytest.raises(BrokenPromise, match="compressed"):
        compare(outputs(model), outputs(ruined), samples)
    with pytest.raises(UserError, match="original"):
        compare(outputs(ruined), outputs(model), samples)
    with pytest.raises(UserError, match="different shapes"):
        compare(outputs(model), outputs(llama(vocabulary=101)), samples)


def test_paired_test_sees_a_small_but_steady_loss() -> None:
    g = torch.Generator().manual_seed(0)
    hard = torch.rand(64, 1, generator=g) * 4
    base = hard + torch.rand(64, 50, generator=g)
    kl, top1 = torch.full((64, 50), 0.01, dtype=torch.float64), torch.ones(64, 50, dtype=torch.bool)
    worse = summarize(Quality(kl, base, base + 0.005 + 0.01 * torch.randn(64, 50, generator=g), top1), metric="kl")
    # sequences differ far more than the models, so intervals overlap, yet the paired test is sure
    assert worse["details"]["perplexity"]["low"] < worse["perplexity_original"] < worse["details"]["perplexity"]["high"]
    assert worse["perplexity_p_value"] < 0.001 and worse["details"]["perplexity_p_value"]["perplexity_ratio"] == pytest.approx(
        1.005, abs=0.001
    )
    even = summarize(Quality(kl, base, base + 0.01 * torch.randn(64, 50, generator=g), top1), metric="kl")
    assert even["perplexity_p_value"] > 0.01


def test_classifier() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.add_(torch.randn(10, 12) * 0.1)
    x = torch.randn(500, 3, 4)
    with torch.no_grad():
        y = model(x).argmax(-1)
        y[:50] = (y[:50] + 1) % 10
        agree = (model(x).argmax(-1) == other(x).argmax(-1)).double().mean().item()
        right = (other(x).argmax(-1) == y).double().mean().item()
    found = summarize(compare(outputs(model), outputs(other), Samples(x, y, 1, 500, ""), batch=64), metric="accuracy")
    assert found["accuracy_original"] == 0.9 and found["accuracy"] == right and found["top1_agreement"] == agree
    assert found["details"]["top1_agreement"]["low"] < agree < found["details"]["top1_agreement"]["high"]
    assert "perplexity" not in found and found["details"]["kl_mean"]["unit"] == "nats/sample" and 0 < found["accuracy_p_value"] <= 1
    # targets that are no classes: KL and agreement remain
    scores = summarize(compare(outputs(model), outputs(other), Samples(x, x.sum((1, 2)), 1, 500, "")), metric="kl")
    assert "accuracy" not in scores and "perplexity" not in scores and scores["top1_agreement"] == agree


def test_stories() -> None:
    stories = DATA / "text" / "tinystories_1000.jsonl.gz"
    if not stories.is_file():
        pytest.skip(f"no real data at {DATA}")
    source = models.open_model(DATA / "stories260k")
    model = source.load(torch.float32)
    # the loss that the model's own documentation states: <s> and text, cut at 512 tokens, stories 0 to 59
    tokenizer = source.tokenizer()
    total = count = 0.0
    with gzip.open(stories, "rt", encoding="utf-8") as lines:
        for _, line in zip(range(60), lines, strict=False):
            ids = torch.tensor([tokenizer(json.loads(line))["input_ids"][:512]])
            quality = compare(outputs(model), outputs(model), Samples(ids, None, ids.shape[1], 1, ""))
            total, count = total + float(quality.nll.sum()), count + quality.nll.numel()
    assert total / count == pytest.approx(1.4219, abs=0.003)
    samples = open_data(str(stories), source, seed=0, limits=(1, 1, 12)).certify
    found = summarize(compare(outputs(model), outputs(noisy(model, 0.05)), samples, batch=4), metric="kl")
    assert (
        5 < found["perplexity_original"] < 8 and found["perplexity"] > found["perplexity_original"] and found["perplexity_p_value"] < 0.01
    )
    assert (
        found["kl_mean_low"] < found["kl_mean"] < found["kl_mean_high"]
        and found["kl_median"] < found["kl_p95"] < found["kl_p99"] < found["kl_p999"]
    )
    assert found["details"]["kl_mean"]["n"] == 12 * 511


def test_speed_takes_turns() -> None:
    model = llama()

    class Slow(nn.Module):
        """The same model behind a wait, so that the ratio is known to be far below 1."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.config, self.calls = inner, inner.config, [0]

        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            self.calls[0] += 1
            time.sleep(0.05)
            return self.inner(input_ids, **more)

    slow = Slow(model)
    found = measurement.speed(model, slow, prompt=16, new=3, repeats=3)
    assert slow.calls[0] == 4 * (1 + 3)
    assert found["decode_tokens_per_s"] < 20 and found["decode_tokens_per_s"] < found["original"]["decode_tokens_per_s"]
    assert found["prefill_tokens_per_s"] < 16 * 20
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s_original", "prefill_tokens_per_s_original"):
        entry = found["details"][key]
        assert (
            entry["n"] == 3
            and entry["low"] <= entry["high"]
            and entry["dtype"] == "float32"
            and entry["threads"] == torch.get_num_threads()
        )
    assert 0 < found["details"]["decode_tokens_per_s"]["ratio"] < 1
    with pytest.raises(UserError, match="context of 256"):
        measurement.speed(model, model, prompt=250, new=32)


def test_memory_is_seen_in_children_too() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    before = measurement.peak_memory()
    held = torch.ones(10_000_000)
    assert measurement.peak_memory() >= before and held.sum() == 10_000_000
    with measurement.watch() as peak:
        base = peak.bytes
        code = "import time; held = bytearray(b'x') * 120_000_000; time.sleep(0.4)"
        subprocess.run([sys.executable, "-c", code], check=True)
    assert peak.bytes > base + 110_000_000 and peak.looks > 5
    # the child is gone, yet it is not forgotten
    assert measurement.peak_memory() >= 120_000_000


def test_hardware_and_sizes() -> None:
    machine = measurement.hardware()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 10**8 and machine["torch"] == torch.__version__ and machine["processor"]
    found = measurement.sizes(67, 240, 60, files=99)
    assert found["bytes"] == 67 and found["bytes_original"] == 240 and found["bits_per_weight"] == pytest.approx(67 * 8 / 60)
    assert all(set(entry) >= KEYS for entry in found["details"].values())


def test_measure_a_folder_against_its_original(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "first")
    noisy(model, 0.05).to(torch.bfloat16).save_pretrained(tmp_path / "second")
    found = measurement.measure(tmp_path / "second", tmp_path / "first", rows(), repeats=1)
    expected = {"perplexity", "perplexity_original", "perplexity_p_value", "kl_mean", "kl_mean_low", "kl_mean_high", "kl_median", "kl_p95"}
    expected |= {"kl_p99", "kl_p999", "top1_agreement", "bytes", "bytes_original", "bits_per_weight", "peak_memory_bytes"}
    expected |= {"decode_tokens_per_s", "prefill_tokens_per_s"}
    assert set(found) == expected | {"details", "hardware", "original"}
    assert found["bytes_original"] == 2 * found["bytes"] and found["bits_per_weight"] == 16
    assert found["details"]["bytes"]["files"] == (tmp_path / "second" / "model.safetensors").stat().st_size
    assert found["details"]["decode_tokens_per_s"]["dtype"].startswith("bfloat16") and found["peak_memory_bytes"] > 10**8
    assert all({"unit", "n"} <= set(entry) for entry in found["details"].values())
    assert json.loads(json.dumps(found)) == found


def test_original_named_in_the_certificate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--against"):
        measurement.original_of(tmp_path)
    (tmp_path / "certificate.json").write_text('{"model": {"spec": "somewhere/model"}}')
    assert measurement.original_of(tmp_path) == "somewhere/model"
    (tmp_path / "certificate.json").write_text("{}")
    with pytest.raises(UserError, match="--against"):
        measurement.original_of(tmp_path)
