"""What a compressed model is worth: quality against the original, bytes, speed, memory. Each number with unit, count and spread."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic import artifact, models
from laconic.calibration import answer_of
from laconic.core.decoder import Decoder, Draw, Stack
from laconic.core.errors import BrokenPromise, UserError
from laconic.core.packed import Held
from laconic.core.router import Load, Routed
from laconic.encoders import feed
from laconic.kernels import divergence
from laconic.kernels.picks import _processor
from laconic.kernels.place import device, here
from laconic.stepping import Steps, steps_of

if TYPE_CHECKING:
    from laconic.data import Samples

# below this agreement with the original a format has collapsed, and its other numbers compare nothing
COLLAPSED = 0.25

Outputs = Callable[[Tensor], Tensor]


class Quality(NamedTuple):
    """Per prediction, each (sequences, tokens): kl in nats and both losses in nats, fp64; top1 whether the first choices agree, bool.
    For a classifier one prediction a sample (or a token of it), and in place of the losses 1.0 where the class is right, else 0.0 (NaN
    without classes)."""

    kl: Tensor
    nll_original: Tensor
    nll: Tensor
    top1: Tensor


def outputs(module: nn.Module) -> Outputs:
    """inputs -> logits in fp32, whatever the module returns around them; no KV cache is made."""
    plain = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}

    def run(inputs: Tensor) -> Tensor:
        return answer_of(module(inputs, **plain)).float()

    return run


def compare(
    original: Outputs, compressed: Outputs, samples: Samples, *, batch: int = 1, progress: Callable[[int, int], None] | None = None
) -> Quality:
    """Both models over the same tokens, `batch` rows at a time; only numbers per token are kept. progress(done, total) rows.

    original, compressed: tokens (b, t) -> logits (b, t, v), or inputs (b, ...) -> logits (b, classes). Position i of a row predicts
    token i + 1, so a row of t tokens gives t - 1 numbers. Raises UserError or BrokenPromise where a model's logits are not finite."""
    total = samples.inputs.shape[0]
    targets = samples.targets
    kept: list[Quality] = []
    with torch.inference_mode():
        for start in range(0, total, batch):
            inputs = here(samples.inputs[start : start + batch])
            p, q = original(inputs), compressed(inputs)
            if p.shape != q.shape:
                shapes = f"{tuple(p.shape)} and {tuple(q.shape)}"
                raise UserError(f"the models answer in different shapes, {shapes}: compare a model with the one it was made from")
            kept.append(_text(inputs, p, q) if targets is None else _classes(here(targets[start : start + batch]), p, q))
            # not kept while the next are made: logits over a large vocabulary are wide
            del p, q
            if progress is not None:
                progress(min(start + batch, total), total)
    return Quality(*(torch.cat(column).cpu() for column in zip(*kept, strict=True)))


def _finite(found: divergence.Pointwise, p: Tensor) -> None:
    if bool(torch.isnan(found.kl).any()):
        if not bool(torch.isfinite(p).all()):
            raise UserError("the original model's outputs are not finite: check its weights, or load it in float32")
        raise BrokenPromise("the compressed model's outputs are not finite")


def _text(tokens: Tensor, p: Tensor, q: Tensor) -> Quality:
    rows: list[Quality] = []
    for i in range(tokens.shape[0]):
        found = divergence.pointwise(p[i, :-1], q[i, :-1], tokens[i, 1:])
        _finite(found, p[i])
        rows.append(Quality(found.kl, found.nll_p, found.nll_q, found.top1))
    return Quality(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _classes(targets: Tensor, p: Tensor, q: Tensor) -> Quality:
    found = divergence.pointwise(p.flatten(0, -2), q.flatten(0, -2))
    _finite(found, p)
    if p.ndim > 2:
        # an answer for each token of a row, none of them known to be right
        kl = found.kl.reshape(len(p), -1)
        return Quality(kl, torch.full_like(kl, math.nan), torch.full_like(kl, math.nan), found.top1.reshape(len(p), -1))
    if targets.ndim == 1 and not targets.is_floating_point():
        hits_p, hits_q = (p.argmax(-1) == targets).double(), (q.argmax(-1) == targets).double()
    else:
        hits_p = hits_q = torch.full_like(found.kl, math.nan)
    return Quality(found.kl[:, None], hits_p[:, None], hits_q[:, None], found.top1[:, None])


# ---- numbers with their spread


def _entry(unit: str, n: int, ends: tuple[float, float] | None, spread: float | None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": unit, "n": n}
    if ends is not None:
        found |= {"low": float(ends[0]), "high": float(ends[1])}
    if spread is not None and math.isfinite(spread):
        found["spread"] = float(spread)
    return found | more


def _exact(value: float, unit: str, **more: Any) -> dict[str, Any]:
    """The entry of a number that was counted, not sampled."""
    return {"unit": unit, "n": 1, "low": value, "high": value, "spread": 0} | more


def _deviation(values: Tensor) -> float | None:
    return float(values.double().std()) if values.shape[0] > 1 else None


def summarize(quality: Quality, *, metric: str, seed: int = 0) -> dict[str, Any]:
    """Flat numbers and `details`: key -> {unit, n, low, high, spread}; low and high are the ends of a 95 % interval, spread is the
    standard deviation over sequences (samples). metric: "kl" for text, "accuracy" for classes.

    Intervals: bootstrap over sequences with `seed` (none for a single sequence); shares of a classifier: Wilson. The p-value of the
    perplexities: sign-flip permutation of each sequence's difference of mean losses, two-sided; of the accuracies: exact McNemar."""
    s, t = quality.kl.shape
    many = s > 1
    found: dict[str, Any] = {}
    details: dict[str, Any] = {}
    of_rows = f"{s} sequences of {t} tokens" if metric == "kl" else f"{s} samples"

    rows = quality.kl.mean(1)
    found["kl_mean"] = float(quality.kl.mean())
    ends = divergence.bootstrap_mean(rows, seed=seed) if many else None
    if ends is not None:
        found["kl_mean_low"], found["kl_mean_high"] = ends
    unit = "nats/token" if metric == "kl" else "nats/sample"
    details["kl_mean"] = _entry(unit, s * t, ends, _deviation(rows), over=of_rows, interval="95 % bootstrap over sequences")
    qs = {"kl_median": 0.5, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999}
    around = divergence.bootstrap_quantiles(quality.kl, tuple(qs.values()), seed=seed) if many else (None,) * len(qs)
    for (key, q), pair in zip(qs.items(), around, strict=True):
        found[key] = divergence.quantile(quality.kl, q)
        by_row = torch.tensor([divergence.quantile(row, q) for row in quality.kl]) if t > 1 else quality.kl[:, 0]
        details[key] = _entry(unit, s * t, pair, _deviation(by_row), over=of_rows)

    share = quality.top1.double().mean(1)
    agreement = float(quality.top1.double().mean())
    found["top1_agreement"] = agreement
    if t > 1:
        ends = divergence.bootstrap_mean(share, seed=seed) if many else None
        details["top1_agreement"] = _entry("share", s * t, ends, _deviation(share), over=of_rows)
    else:
        ends = divergence.wilson(int(quality.top1.sum()), s)
        details["top1_agreement"] = _entry("share", s, ends, _deviation(share), interval="95 % Wilson")
    if metric == "kl" and t > 1 and not bool(quality.nll.isnan().any()):
        _perplexities(quality, found, details, seed=seed, over=of_rows)
    elif metric == "accuracy":
        _accuracies(quality, found, details)
    if agreement < COLLAPSED:
        found["collapsed"] = True
    found["details"] = details
    return found


def _perplexities(quality: Quality, found: dict[str, Any], details: dict[str, Any], *, seed: int, over: str) -> None:
    s, t = quality.nll.shape
    for key, losses in (("perplexity", quality.nll), ("perplexity_original", quality.nll_original)):
        rows = losses.mean(1)
        found[key] = math.exp(min(float(losses.mean()), 700.0))
        ends = tuple(math.exp(min(end, 700.0)) for end in divergence.bootstrap_mean(rows, seed=seed)) if s > 1 else None
        details[key] = _entry("perplexity/token", s * t, ends, _deviation(rows.clamp(max=700.0).exp()), over=over)  # type: ignore[arg-type]
    difference = (quality.nll - quality.nll_original).mean(1)
    p = divergence.sign_flip(difference, seed=seed)
    found["perplexity_p_value"] = p.value
    ends = divergence.bootstrap_mean(difference, seed=seed) if s > 1 else None
    ratio = {"perplexity_ratio": math.exp(min(float(difference.mean()), 700.0))}
    if ends is not None:
        ratio |= {"perplexity_ratio_low": math.exp(min(ends[0], 700.0)), "perplexity_ratio_high": math.exp(min(ends[1], 700.0))}
    patterns = f"all {p.draws} patterns" if p.exact else f"{p.draws} drawn patterns, seed {seed}"
    test = f"paired sign-flip permutation over sequences, two-sided, {patterns}"
    details["perplexity_p_value"] = _p_entry(p, s, test) | ratio


def _p_entry(p: divergence.PValue, n: int, test: str) -> dict[str, Any]:
    # a drawn p-value has an interval of its own, an exact one has not
    error = 0.0 if p.exact else math.sqrt(p.value * (1 - p.value) / p.draws)
    ends = (p.value, p.value) if p.exact else divergence.wilson(round(p.value * p.draws), p.draws)
    return _entry("probability", n, ends, error, test=test)


def _accuracies(quality: Quality, found: dict[str, Any], details: dict[str, Any]) -> None:
    s = quality.nll.shape[0]
    for key, hits in (("accuracy", quality.nll), ("accuracy_original", quality.nll_original)):
        found[key] = float(hits.mean())
        details[key] = _entry("share", s, divergence.wilson(int(hits.sum()), s), _deviation(hits[:, 0]), interval="95 % Wilson")
    p = divergence.mcnemar(quality.nll_original[:, 0] > 0, quality.nll[:, 0] > 0)
    found["accuracy_p_value"] = p.value
    details["accuracy_p_value"] = _p_entry(p, s, f"exact McNemar, two-sided, {p.draws} samples on which one alone is right")


# ---- bytes


def sizes(bytes_stored: int, bytes_original: int, parameters: int, **more: Any) -> dict[str, Any]:
    """The keys bytes, bytes_original and bits_per_weight with their details; parameters: of the original, each stored tensor once."""
    bits = bytes_stored * 8 / parameters
    return {
        "bytes": bytes_stored,
        "bytes_original": bytes_original,
        "bits_per_weight": bits,
        "details": {
            "bytes": _exact(bytes_stored, "bytes", **more),
            "bytes_original": _exact(bytes_original, "bytes"),
            "bits_per_weight": _exact(bits, "bits/weight", parameters=parameters),
        },
    }


# ---- multiplications


def routed(model: nn.Module) -> list[Routed]:
    """The parts of a model."""
    return [module for module in model.modules() if isinstance(module, Routed)]


def load_of(model: nn.Module, batches: Iterable[Tensor], task: str) -> tuple[Load, int]:
    """Multiplications of a model with weights for one token of text or one image, on average over what it is given, and over how many.
    Products without weights (attention's own) and lookups are no part of it."""
    parts = routed(model)
    inside = {id(module) for part in parts for module in part.modules()}
    others = [m for m in model.modules() if id(m) not in inside and (isinstance(m, Held) or artifact.holdable(m)) and not _looks_up(m)]
    seen = total = 0

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        weight: Any = layer.weight
        n = weight.shape[1] if type(layer).__name__ == "Conv1D" else weight.shape[0]
        size = weight.numel() if isinstance(weight, Tensor) else weight.matrix[0] * weight.matrix[1]
        total += size * output.numel() // n

    for part in parts:
        part.forget()
    run = outputs(model)
    with ExitStack() as stack, torch.inference_mode():
        for layer in others:
            stack.callback(layer.register_forward_hook(count).remove)
        for batch in batches:
            run(batch)
            seen += batch.numel() if task == "text" else batch.shape[0]
    found = Load(*[total / max(seen, 1)] * 3)
    for part in parts:
        # over the tokens of the whole model: a part may see fewer
        found = found.plus(Load(*(value / max(seen, 1) for value in part.spent)))
    return found, seen


def multiplied(model: nn.Module, batches: Iterable[Tensor], task: str) -> dict[str, Any]:
    """The keys of what a routed model multiplies: on average, at most, and what it would without routing."""
    load, seen = load_of(model, batches, task)
    unit = str(said(load, seen, task)["unit"])
    return {
        "multiplications": load.expected,
        "multiplications_worst": load.worst,
        "multiplications_original": load.dense,
        "details": {
            "multiplications": _entry(unit, seen, None, None, what="with weights, on average"),
            "multiplications_worst": _exact(load.worst, unit, what="whatever the input"),
            "multiplications_original": _exact(load.dense, unit),
        },
    }


def _looks_up(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or getattr(layer, "kind", "") == "Embedding"


def said(load: Load, seen: int, task: str) -> dict[str, Any]:
    """A load as plans and certificates have it."""
    return {**load._asdict(), "unit": "multiplications/token" if task == "text" else "multiplications/image", "n": seen}


# ---- speed


def carried(found: Any) -> dict[str, Any]:
    """What a model's output hands to its next step: a cache of keys and values, or the states of a scan."""
    return {name: found[name] for name in ("past_key_values", "cache_params") if found.get(name) is not None}


def timed_generation(model: nn.Module, tokens: Tensor, new: int, stack: Stack | None = None) -> tuple[float, float]:
    """Seconds of one pass over tokens (1, prompt) and of `new` greedy steps from what it carries between tokens: of an empty stack, or of
    the model's own forward pass."""
    start = time.perf_counter()
    if stack is not None:
        chosen, middle = tokens, start
        for number in range(new + 1):
            logits = stack.answer(chosen, keep=1).logits
            stack.settle(chosen.shape[1])
            chosen = logits.argmax(-1)
            if not number:
                middle = time.perf_counter()
        return middle - start, time.perf_counter() - middle
    found = model(input_ids=tokens, use_cache=True)
    chosen = found.logits[:, -1:].argmax(-1)
    middle = time.perf_counter()
    for _ in range(new):
        found = model(input_ids=chosen, use_cache=True, **carried(found))
        chosen = found.logits[:, -1:].argmax(-1)
    return middle - start, time.perf_counter() - middle


def any_tokens(model: nn.Module, count: int) -> Tensor:
    """(1, count) token ids of a model's vocabulary, always the same."""
    config: Any = model.config
    return torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))


def speed(original: nn.Module, compressed: nn.Module, *, prompt: int = 128, new: int = 32, repeats: int = 7) -> dict[str, Any]:
    """Tokens per second of both causal models of transformers, batch 1: prefill over `prompt` tokens, then decode of `new` greedy tokens
    from the KV cache, each run as `generate` runs it (`loop`: a tape of native steps, or transformers' forward pass). The models take
    turns, after one warm-up each; median of `repeats`, low and high are the slowest and the fastest, spread is the standard deviation,
    ratio is the median of compressed over original, turn by turn."""
    config: Any = compressed.config
    context = getattr(config, "max_position_embeddings", None) or prompt + new
    if prompt + new > context:
        raise UserError(f"{prompt} tokens of prompt and {new} new ones do not fit the context of {context}: ask for fewer")
    tokens = any_tokens(compressed, prompt)
    models = {"original": original, "compressed": compressed}
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    loops = {name: "transformers" if isinstance(steps_of(model), str) else "tape" for name, model in models.items()}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            # who begins changes from turn to turn, so that neither always runs on the warmer machine
            for name in list(models)[:: 1 if turn % 2 else -1]:
                stack = Steps(models[name]) if loops[name] == "tape" else None
                seconds = timed_generation(models[name], tokens, new, stack)
                if turn:
                    rates[name]["prefill"].append(prompt / seconds[0])
                    rates[name]["decode"].append(new / seconds[1])
    found: dict[str, Any] = {"original": {}}
    details: dict[str, Any] = {}
    settings = {"prompt": prompt, "new": new, "batch": 1, "threads": torch.get_num_threads()}
    for phase in ("decode", "prefill"):
        key = f"{phase}_tokens_per_s"
        first, second = rates["original"][phase], rates["compressed"][phase]
        found[key], found["original"][key] = statistics.median(second), statistics.median(first)
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        details[key] = _rates(second) | settings | {"dtype": _dtype(compressed), "loop": loops["compressed"], "ratio": ratio}
        details[f"{key}_original"] = _rates(first) | settings | {"dtype": _dtype(original), "loop": loops["original"]}
    return found | {"details": details}


class Decoded(NamedTuple):
    """What decoding one prompt came to: new tokens, how many of them were drafted and accepted, passes through the whole model, passes of
    single layers and of parts beside the model (those of the prompt not counted), seconds after the prompt."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    passes: int
    layer_passes: int
    part_passes: int
    seconds: float


def decoded(decoder: Decoder, stack: Stack, prompt: Tensor, *, new: int, draw: Draw, ends: frozenset[int] = frozenset()) -> Decoded:
    """prompt (1, t) -> at most `new` tokens by a decoder on a fresh stack."""
    drafted = accepted = passes = 0
    with torch.inference_mode():
        rounds = decoder(stack, prompt, limit=new, draw=draw, ends=ends)
        tokens = next(rounds).tokens[0].tolist()
        layers, parts, start = stack.layer_passes, stack.part_passes, time.perf_counter()
        for found in rounds:
            tokens += found.tokens[0].tolist()
            drafted, accepted, passes = drafted + found.drafted, accepted + found.accepted, passes + 1
    seconds = time.perf_counter() - start
    return Decoded(tuple(tokens), drafted, accepted, passes, stack.layer_passes - layers, stack.part_passes - parts, seconds)


def plainly(model: nn.Module, prompt: Tensor, new: int) -> tuple[tuple[int, ...], float]:
    """prompt (1, t) -> `new` greedy tokens one by one, as transformers caches, and the seconds after the first."""
    with torch.inference_mode():
        found = model(input_ids=prompt, use_cache=True)
        tokens = [int(found.logits[0, -1].argmax())]
        start = time.perf_counter()
        while len(tokens) < new:
            found = model(input_ids=torch.tensor(tokens[-1:])[None], use_cache=True, **carried(found))
            tokens.append(int(found.logits[0, -1].argmax()))
    return tuple(tokens), time.perf_counter() - start


def drafting(
    decoder: Decoder,
    make: Callable[[], Stack],
    plain: Callable[[Tensor, int], tuple[tuple[int, ...], float]],
    prompts: Tensor,
    *,
    new: int = 64,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """A decoder against decoding one by one with the same model, prompts (n, t), `new` greedy tokens each: tokens a second of both, prompt
    by prompt in turns; how many drafted tokens stand; passes of layers a token; prompts whose tokens are all the same. make: an empty
    stack; plain: one by one, tokens and the seconds after the first."""
    ours: list[Decoded] = []
    rates: dict[str, list[float]] = {"drafted": [], "plain": []}
    same = 0
    for i, prompt in enumerate(prompts.split(1)):
        turns: dict[str, Any] = {}
        for name in ("drafted", "plain")[:: 1 if i % 2 else -1]:
            if name == "plain":
                turns[name] = plain(prompt, new)
            else:
                turns[name] = decoded(decoder, make(), prompt, new=new, draw=Draw())
        ours.append(turns["drafted"])
        same += turns["drafted"].tokens == turns["plain"][0]
        rates["drafted"].append((new - 1) / ours[-1].seconds)
        rates["plain"].append((new - 1) / turns["plain"][1])
    drafted, tokens, prompts_seen = sum(one.drafted for one in ours), (new - 1) * len(ours), len(ours)
    counted: dict[str, tuple[float, str, int]] = {
        "drafts_accepted": (sum(one.accepted for one in ours) / max(drafted, 1), "share of drafted tokens", drafted),
        "tokens_per_pass": (tokens / sum(one.passes for one in ours), "tokens", tokens),
        "layer_passes_per_token": (sum(one.layer_passes for one in ours) / tokens, "passes/token", tokens),
        "part_passes_per_token": (sum(one.part_passes for one in ours) / tokens, "passes/token", tokens),
        "drafted_same_as_plain": (same / prompts_seen, "share of prompts", prompts_seen),
    }
    found: dict[str, Any] = {key: value for key, (value, _, _) in counted.items()}
    details: dict[str, Any] = {key: {"unit": unit, "n": n} for key, (_, unit, n) in counted.items()}
    found["drafted_tokens_per_s"] = statistics.median(rates["drafted"])
    ratio = statistics.median(a / b for a, b in zip(rates["drafted"], rates["plain"], strict=True))
    settings = {
        "prompt": prompts.shape[1],
        "new": new,
        "batch": 1,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    details["drafted_tokens_per_s"] = _rates(rates["drafted"]) | settings | {"ratio": ratio}
    details["drafted_tokens_per_s_plain"] = _rates(rates["plain"]) | settings
    return found | {"details": details}


def _rates(values: list[float]) -> dict[str, Any]:
    return _entry("tokens/s", len(values), (min(values), max(values)), statistics.stdev(values) if len(values) > 1 else None)


def _dtype(model: nn.Module) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()}
    return "+".join(sorted(kinds))


# ---- memory and machine


def _high_water(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _used(kind: int) -> int:
    most = resource.getrusage(kind).ru_maxrss
    # kilobytes everywhere but on macOS
    return most if sys.platform == "darwin" else most * 1024


def peak_memory() -> int:
    """Peak resident bytes of this process since it began, plus those of its living children, as the operating system counts them. The
    peaks need not have come at one time, so this is an upper bound; a finished child counts where it alone was larger."""
    import psutil

    own = _high_water(os.getpid()) or _used(resource.RUSAGE_SELF)
    children = 0
    with suppress(psutil.Error):
        children = sum(_high_water(child.pid) for child in psutil.Process().children(recursive=True))
    return max(own + children, _used(resource.RUSAGE_CHILDREN))


@dataclass
class Peak:
    """What `watch` saw: the largest sum of resident bytes over the process tree, and how many looks were taken."""

    bytes: int = 0
    looks: int = 0


@contextmanager
def watch(every: float = 0.02) -> Iterator[Peak]:
    """Looks at the resident memory of this process and all its children every 20 ms, in a thread; the peak is read after the block."""
    import psutil

    me = psutil.Process()
    peak = Peak()
    over = threading.Event()

    def look() -> None:
        total = me.memory_info().rss
        with suppress(psutil.Error):
            for child in me.children(recursive=True):
                with suppress(psutil.Error):
                    total += child.memory_info().rss
        peak.bytes = max(peak.bytes, total)
        peak.looks += 1

    def run() -> None:
        while not over.wait(every):
            look()

    look()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        look()


def hardware() -> dict[str, Any]:
    """The machine in hand: processor, cores this process may use, threads of torch, memory, versions."""
    import psutil

    # not platform.processor(): it starts a child, which for a moment counts as large as this process
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        **({"gpu": torch.cuda.get_device_name()} if device().type == "cuda" else {}),
    }


# ---- all of it


def original_of(path: str | Path) -> str:
    """The original that the certificate of an artifact names."""
    file = Path(path) / "certificate.json"
    if not file.is_file():
        raise UserError(f"{path} has no certificate.json that names its original: pass --against MODEL")
    try:
        named = json.loads(file.read_text())["model"]
        return str(named["spec"] if isinstance(named, Mapping) else named)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not name the original: pass --against MODEL") from error


def measure(
    path: str | Path,
    against: str | Path | None,
    samples: Samples,
    *,
    metric: str = "kl",
    given: Mapping[str, Tensor] = models.NOTHING,
    with_speed: bool = True,
    default: Path | None = None,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 7,
    limit: int | None = None,
    inputs: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The compressed model at `path` against its original (None: the one its certificate names; `default` stands for the empty name).

    Quality from dense fp32 copies of both over `samples`; speed of language models from the form that is served, other tensors in
    `dtype`, against the original in `dtype`. limit: an elastic result cut to so
    many bytes. inputs: products of the result round their inputs to so many bits; quality is then that of the form that is served.
    Flat keys, `details` by key, `hardware`; a key that does not apply is absent."""
    against = original_of(path) if against is None else against
    source = models.open_model(against or None, default=default)
    packed = models.is_artifact(path)
    own_original, files_original = _bytes_of(source)
    own, files = _bytes_of(artifact.stream(path, limit=limit) if packed else models.open_model(path, default=default))
    found: dict[str, Any] = {}
    details: dict[str, Any] = {}

    def add(part: dict[str, Any]) -> None:
        details.update(part.pop("details"))
        found.update(part)

    with watch() as peak:
        original = source.load(torch.float32).eval()
        if packed:
            compressed = artifact.load(path, dtype=torch.float32, thaw=inputs is None, limit=limit, inputs=inputs, log=log)
        else:
            compressed = artifact.load_any(path, dtype=torch.float32, default=default)
        if source.traced and source.path is not None:
            for module in (original, compressed):
                feed(module, given)
        rows = batch if source.task == "text" else max(batch, 64)
        quality = compare(outputs(original), outputs(compressed.eval()), samples, batch=rows, progress=progress)
        add(summarize(quality, metric=metric, seed=seed))
        add(sizes(own, own_original, source.parameters, files=files))
        details["bytes_original"] |= {"files": files_original}
        if routed(compressed):
            add(multiplied(compressed, samples.inputs.split(rows), source.task))
        if with_speed and source.task == "text":
            del original, compressed
            original = source.load(dtype).eval()
            compressed = artifact.load_any(path, dtype=dtype, default=default, limit=limit, inputs=inputs).eval()
            add(speed(original, compressed, repeats=repeats))
    if inputs is not None:
        found["input_bits"] = inputs
        details["input_bits"] = _exact(inputs, "bits", what="inputs of products with codes, rounded as they come")
    memory = max(peak.bytes, peak_memory())
    found["peak_memory_bytes"] = memory
    details["peak_memory_bytes"] = _exact(memory, "bytes", what="process tree of this measurement, which holds both models")
    return found | {"details": details, "hardware": hardware()}


def _bytes_of(source: Any) -> tuple[int, int]:
    """Bytes of all stored tensors, and of the files that hold them (the same where there are none)."""
    tensors = sum(info.stop - info.start for info in source.infos.values())
    return tensors, artifact.file_bytes_of(source.path) if source.path is not None else tensors
