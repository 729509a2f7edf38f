"""Train `nano`, the embedded default model: `python -m laconic.zoo.nano [--quick | --hours H] [--tokens N] [--resume]`.

Llama architecture, 7.3 M parameters, byte-level BPE of 4,096, context 2,048, trained on Python sources
(`corpus.training`). Muon for the hidden matrices, AdamW for the embedding and the norms; warm-up, stable, then
linear decay to zero. Progress is the larger of tokens over their target and time over its limit, so either can end
a run; a file FINISH in the scratch folder starts the decay at once, and it then takes a third of the tokens seen.
The scratch folder holds train.log and, written every five minutes, model/, a folder that `--resume` accepts.
Without `--quick` or `--hours` a run sees 100 M tokens, which takes two idle cores with AVX-512 six to eight hours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.core.errors import UserError
from laconic.zoo import corpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import torch

FULL = 100_000_000
SCORED = 1 << 15
BOS = "<|endoftext|>"


def path() -> Path:
    """Return the folder of the shipped model, an ordinary Hugging Face folder."""
    return Path(__file__).parent / "models" / "nano"


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the defaults are nano's."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    context: int = 2048


@dataclass(frozen=True)
class Recipe:
    """Knobs of a run. Lengths in tokens, shares of the whole run, rates per step; begun: tokens of it that a run cut short saw."""

    tokens: int = FULL
    hours: float = math.inf
    batch: int = 16384
    short: int = 256
    micro: int = 2048
    muon: float = 0.01
    adamw: float = 0.002
    weight_decay: float = 0.05
    warmup: int = 100
    decay_at: float = 0.75
    long_at: float = 0.92
    begun: int = 0


def rate(progress: float, step: int, recipe: Recipe) -> float:
    """Multiplier of the learning rates at `progress` (0 to 1): linear warm-up, one, linear decay to zero."""
    up = min(1.0, (step + 1) / recipe.warmup)
    down = min(1.0, max(0.0, (1 - progress) / (1 - recipe.decay_at)))
    return up * down


def train_tokenizer(texts: list[str], vocabulary: int = 4096, special: Sequence[str] = (BOS,)) -> Any:
    """Return a byte-level BPE of exactly `vocabulary` entries, the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False),
    )
    return tok


def new_model(shape: Shape, seed: int = 0) -> torch.nn.Module:
    """Return a fresh fp32 LlamaForCausalLM whose residual outputs start small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    # transformers draws from the global generator: seeded here, given back as it was
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_((2 * shape.layers) ** -0.5)
    return model


class Stream:
    """Endless packed tokens: a pass holds every document as often as it says, shuffled anew.

    A pass is cut into `lanes` and rows are taken from one lane after the other: rows that followed one another in
    the text would fill a batch from one or two files.
    """

    def __init__(self, documents: list[tuple[np.ndarray, int]], seed: int, lanes: int = 64) -> None:
        self.documents = documents
        self.seed = seed
        self.lanes = lanes
        self.passes = 0
        self._pass()

    def _pass(self) -> None:
        import numpy as np

        order = [i for i, (_, times) in enumerate(self.documents) for _ in range(times)]
        np.random.default_rng([self.seed, self.passes]).shuffle(order)
        self.passes += 1
        flat = np.concatenate([self.documents[i][0] for i in order])
        self.text = flat[: len(flat) // self.lanes * self.lanes].reshape(self.lanes, -1)
        self.at = [0] * self.lanes
        self.lane = 0

    def take(self, rows: int, length: int) -> torch.Tensor:
        """Return int64 [rows, length + 1]; the last token of a row opens the next row of its lane."""
        import numpy as np
        import torch

        out = []
        for _ in range(rows):
            if self.at[self.lane] + length + 1 > self.text.shape[1]:
                self._pass()
            start = self.at[self.lane]
            out.append(self.text[self.lane, start : start + length + 1])
            self.at[self.lane] = start + length
            self.lane = (self.lane + 1) % self.lanes
        return torch.from_numpy(np.stack(out).astype(np.int64))


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of ids [b, t + 1], each token given those before it."""
    import torch.nn.functional as F

    h = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    logits = F.linear(h, model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **ignored: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole rows as transformers' attention interface wants it: query [b, h, t, d], key and value [b, k, t, d]
    -> [b, t, h, d]. No mask is looked at: packed rows have no padding.

    Queries go a block at a time over the keys up to its end, in batched products that the compiler can fuse around. At rows of 256 a
    whole training step is a third faster than with torch's flash attention for processors.
    """
    import torch

    b, h, t, d = query.shape
    k = key.shape[1]
    block = max(64, t // 8)
    q = (query * scaling).reshape(b * k, h // k, t, d)
    key, value = key.reshape(b * k, t, d), value.reshape(b * k, t, d)
    out = []
    for start in range(0, t, block):
        end = min(start + block, t)
        n = end - start
        scores = torch.bmm(q[:, :, start:end].reshape(b * k, -1, d), key[:, :end].transpose(1, 2)).view(b * k, -1, n, end)
        seen = torch.ones(n, end, dtype=torch.bool).tril(start)
        shares = torch.softmax(scores.float().masked_fill(~seen, -math.inf), -1).to(value.dtype)
        out.append(torch.bmm(shares.view(b * k, -1, end), value[:, :end]).view(b, h, n, d))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def held_out_loss(
    model: Any, tokenizer: Any, texts: list[str], length: int, tokens: int, loss: Callable[[Any, torch.Tensor], torch.Tensor] = loss_of
) -> float:
    """Mean loss of texts in nats per token, in fp32, over evenly spaced pieces of 2,048 tokens, `tokens` in all.

    A piece is read `length` tokens at a time, so that losses at two lengths are over the same tokens.
    """
    import torch

    flat = [t for text in texts for t in [0, *tokenizer.encode(text).ids]]
    number = max(1, min(tokens, len(flat) - 1) // 2048)
    stride = (len(flat) - 2049) // max(1, number - 1) if number > 1 else 0
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(number):
            piece = torch.tensor(flat[i * stride : i * stride + 2049])
            for start in range(0, len(piece) - 1, length):
                ids = piece[start : start + length + 1][None]
                total += float(loss(model, ids)) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
    return total / count


def write_folder(
    model: Any,
    tokenizer: Any,
    out: Path,
    record: dict[str, Any],
    says: Callable[[dict[str, Any]], str] | None = None,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Write model (as bf16), tokenizer, what `says` makes of the record (default: nano's card) and training.json to `out`, whole or not
    at all. marks: what special tokens are for, where it is not all BOS (pad_token, mask_token)."""
    import copy

    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    old = out.with_name(f".{out.name}-old")
    try:
        saved = copy.deepcopy(model).to(torch.bfloat16)
        saved.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        saved.save_pretrained(new)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=BOS,
            **{"pad_token": BOS, **(marks or {})},
            model_max_length=_context(model, 2048),
            clean_up_tokenization_spaces=False,
        ).save_pretrained(new)
        (new / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text((says or card)(record), encoding="utf-8")
        # mkdtemp and safetensors write for the owner alone
        new.chmod(0o755)
        for file in new.iterdir():
            file.chmod(0o644)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _context(model: Any, otherwise: int) -> int:
    """Tokens that a model can read at once, `otherwise` where its config sets no bound."""
    return int(getattr(model.config, "max_position_embeddings", otherwise))


def card(record: dict[str, Any]) -> str:
    """Return the model card that states a training record."""
    tokens = record["tokens"]
    runs = "\n".join(
        f"| {i + 1} | {run['seen']:,} | {run['batch']:,} | {run['short']}, then 2,048 in the last {1 - run['long_at']:.0%} "
        f"| {run['muon']} / {run['adamw']} | {run['minutes']:.0f} "
        f"| {'decayed to zero' if run['finished'] else 'cut short'} |"
        for i, run in enumerate(record["runs"])
    )
    losses = "\n".join(
        f"| {name} | {length} | {loss:.4f} | {math.exp(loss):.2f} |"
        for name, by_length in record.get("losses", {}).items()
        for length, loss in by_length.items()
    )
    held_out = (
        f"{SCORED:,} tokens of each list in evenly spaced pieces of 2,048; both lengths score the same tokens. "
        "Weights as stored (bf16), arithmetic in fp32.\n\n"
        f"| list | tokens of context | loss (nats per token) | perplexity |\n| --- | --- | --- | --- |\n{losses}"
        if losses
        else "Interim weights, written while training goes on: not measured yet."
    )
    left = record.get("corpus", {})
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: [code]
tags: [laconic, code, python]
tokens_seen: {tokens}
---
# nano

The embedded default model of laconic: a language model of Python source code, small enough to ship inside the package
and to compress in minutes on a laptop.

## Architecture

Llama (`LlamaForCausalLM`): 8 layers, hidden 256, intermediate 768, 8 query and 4 KV heads of 32, context 2,048, tied
embedding, 7,344,384 parameters stored in bf16. Byte-level BPE of 4,096 with one special token, `{BOS}` (id 0), which
opens every document.

## Data

Python sources: the standard library with its tests, and the packages that laconic's core install brings (torch, numpy,
safetensors, transformers, tokenizers, pydantic, PyYAML, typer, rich, jinja2, highspy, psutil and what they need). The
standard library comes {record.get("epochs", 1)} times in a pass, any package at most 12 M characters of it.
{left.get("files", 0):,} files were considered. Left out: the {left.get("held out", 0)} held-out modules of `laconic.zoo.corpus`,
{left.get("duplicate", 0)} exact duplicates, {left.get("overlap", 0)} files ({left.get("overlap characters", 0):,} characters) that share
over 5 % of their 50-character windows with a held-out module, {left.get("table or unreadable", 0):,} tables, stubs and sources that
are not text, {left.get("over the cap", 0):,} files over a package's cap.

## Training

{tokens:,} tokens seen, over all runs. Muon for the hidden matrices, AdamW for the embedding and the norms, gradient norm
clipped at 1, documents packed, bf16 autocast over fp32 weights. Linear warm-up, stable, linear decay to zero over the last
quarter; the last rows are 2,048 tokens long. A resumed run starts from the stored weights with a new optimiser state.

| run | tokens | tokens a step | tokens a row | rates (Muon / AdamW) | minutes | end |
| --- | --- | --- | --- | --- | --- | --- |
{runs}

Retrain with `python -m laconic.zoo.nano`, go on with `--resume`.

## Held-out loss

{held_out}

## Intended use

A subject for compression methods, tests and demonstrations. It completes Python text in style, not in sense: no
assistant, and no source of correct code.

## Licence note

The weights come under laconic's licence, Apache-2.0. The training text stays under its own licences: PSF-2.0 (Python), BSD
(torch, numpy, sympy, networkx), Apache-2.0 (transformers, tokenizers, safetensors, huggingface_hub), MIT (pydantic,
PyYAML, typer, rich, highspy and others). Short passages of it may be repeated by the model.
"""


@contextmanager
def _one_core() -> Iterator[None]:
    from laconic.kernels.threads import threads

    with threads(1):
        yield


@_one_core()
def fit(
    model: Any,
    stream: Stream,
    recipe: Recipe,
    threads: int,
    scratch: Path,
    evaluate: Callable[[Any], float],
    save: Callable[[Any, int, float], None],
    say: Callable[[str], None] = print,
    compiled: bool = True,
    every: float = 240,
    save_every: float = 300,
    hidden: str = r".*\.layers\..*",
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = loss_of,
) -> tuple[int, float]:
    """Train model in place; return the tokens seen and the minutes taken. Matrices whose names the regular expression `hidden` matches
    learn by Muon, all other parameters by AdamW. loss: (model, ids [b, t + 1]) -> nats a prediction.

    Each thread runs whole micro-batches through its own view of the weights: on two cores this is three times as
    fast as both cores on every operation, and a core that is busy elsewhere holds a step up less.
    """
    import copy

    import torch

    from laconic.kernels.pairs import narrowly, pairs

    views = [model]
    for _ in range(threads - 1):
        view = copy.deepcopy(model)
        for mine, theirs in zip(model.parameters(), view.parameters(), strict=True):
            theirs.data = mine.data
        views.append(view)
    named = model.named_parameters()
    matrices = sorted((p for name, p in named if p.ndim == 2 and re.fullmatch(hidden, name)), key=lambda p: p.numel())
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    shares = [matrices[i::threads] for i in range(threads) if matrices[i::threads]]
    muons = [torch.optim.Muon(share, lr=recipe.muon, weight_decay=recipe.weight_decay) for share in shares]
    adam = torch.optim.AdamW(others, lr=recipe.adamw, betas=(0.9, 0.95), weight_decay=0.0)
    long = _context(model, recipe.short)
    forward = loss
    if compiled:
        # both lengths are compiled here, in one thread, before the clock starts
        forward = torch.compile(loss, dynamic=False)
        for length in {recipe.short, long}:
            for view in views:
                with narrowly():
                    forward(view, torch.zeros(max(1, recipe.micro // length), length + 1, dtype=torch.int64)).backward()
                view.zero_grad()
    say(f"{threads} threads, {'bf16' if pairs() else 'fp32'}, {'compiled' if compiled else 'eager'}")

    began = evaluated = saved = time.monotonic()
    seen = step = 0
    mean = math.nan
    finish: int | None = None
    progress = recipe.begun / recipe.tokens
    while progress < 1:
        length = long if progress >= recipe.long_at else recipe.short
        rows = max(1, recipe.micro // length)
        # two micro-batches a thread at least, or a slow core holds the other up
        number = max(1, recipe.batch // (rows * length)) if length == recipe.short else max(2 * threads, recipe.batch // length)
        queue = [stream.take(rows, length) for _ in range(number)]
        now_lost, norm = _step(forward, views, queue, muons, adam, rate(progress, step, recipe), recipe)
        seen += number * rows * length
        step += 1
        mean = now_lost if step == 1 else 0.95 * mean + 0.05 * now_lost

        now = time.monotonic()
        if finish is None and progress < recipe.decay_at and (scratch / "FINISH").exists():
            say("FINISH found: the decay starts")
            finish = seen
        progress = max(progress, (recipe.begun + seen) / recipe.tokens, (now - began) / 3600 / recipe.hours)
        if finish is not None:
            progress = max(progress, recipe.decay_at + (1 - recipe.decay_at) * (seen - finish) / max(1, finish / 3))
        if step % 20 == 0:
            speed = seen / (now - began)
            say(f"step {step} tokens {seen:,} progress {progress:.3f} loss {mean:.3f} norm {norm:.2f} {speed:.0f} tokens/s")
        if now - evaluated > every:
            evaluated = now
            say(f"step {step} tokens {seen:,} minutes {(now - began) / 60:.1f} held-out {evaluate(model):.4f}")
        if now - saved > save_every:
            saved = now
            save(model, seen, (now - began) / 60)
    return seen, (time.monotonic() - began) / 60


def _together(jobs: list[Callable[[], None]]) -> None:
    """Run the jobs in a thread each, every operation on one core; raise the first error."""
    import torch

    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        try:
            job()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if errors:
        raise errors[0]


def _step(
    forward: Callable[[Any, torch.Tensor], torch.Tensor],
    views: list[Any],
    queue: list[torch.Tensor],
    muons: Sequence[torch.optim.Optimizer],
    adam: torch.optim.Optimizer,
    scale: float,
    recipe: Recipe,
) -> tuple[float, float]:
    """One update from the micro-batches in queue, which is emptied; return mean loss and gradient norm before clipping."""
    import torch

    from laconic.kernels.pairs import narrowly

    number = len(queue)
    losses: list[float] = []

    def work(view: Any) -> None:
        while True:
            try:
                ids = queue.pop()
            except IndexError:
                return
            with narrowly():
                loss = forward(view, ids)
            (loss / number).backward()
            losses.append(loss.item())

    _together([partial(work, view) for view in views])
    own = list(views[0].parameters())
    for view in views[1:]:
        for mine, theirs in zip(own, view.parameters(), strict=True):
            if theirs.grad is not None:
                mine.grad = theirs.grad if mine.grad is None else mine.grad.add_(theirs.grad)
                theirs.grad = None
    norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
    for optimiser, lr in [*((m, recipe.muon) for m in muons), (adam, recipe.adamw)]:
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
    _together([m.step for m in muons])
    adam.step()
    for p in own:
        p.grad = None
    return sum(losses) / number, float(norm)


def encode(sources: list[corpus.Source], tokenizer: Any, epochs: int) -> list[tuple[np.ndarray, int]]:
    """Return (uint16 tokens, times a pass) of each source; the standard library comes `epochs` times."""
    import numpy as np

    out = []
    for i in range(0, len(sources), 512):
        part = sources[i : i + 512]
        for source, e in zip(part, tokenizer.encode_batch([s.text for s in part]), strict=True):
            out.append((np.array([0, *e.ids], dtype=np.uint16), epochs if source.package == "stdlib" else 1))
    return out


def load(folder: Path, auto: str = "CausalLM") -> tuple[Any, Any, dict[str, Any]]:
    """Return the fp32 model, its `tokenizers.Tokenizer` and the training record of a folder that `write_folder` wrote. auto: by which of
    transformers' AutoModelFor classes it is read."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    if not (folder / "training.json").is_file():
        raise UserError(f"{folder} holds no training.json; give a folder that this script wrote, or leave --resume out")
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return model, tokenizer, json.loads((folder / "training.json").read_text(encoding="utf-8"))


def measure(folder: Path, tokens: int = SCORED) -> dict[str, dict[str, float]]:
    """Return the loss in nats per token of the model in folder, by list (search, certify) and tokens of context (512, 2048)."""
    model, tokenizer, _ = load(folder)
    texts = {name: [t for _, t in corpus.named(name)] for name in ("search", "certify")}
    return {n: {str(c): held_out_loss(model, tokenizer, t, c, tokens) for c in (512, 2048)} for n, t in texts.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train or resume from the command line."""
    p = argparse.ArgumentParser(
        prog="python -m laconic.zoo.nano", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="two hours by the clock, then say what that loses")
    p.add_argument("--hours", type=float, help="end after this many hours")
    p.add_argument("--tokens", type=int, default=FULL, help="end after this many tokens (default %(default)s)")
    p.add_argument("--begun", type=int, default=0, help="with --resume: tokens that a run cut short saw, which goes on where it stood")
    p.add_argument("--out", type=Path, default=path(), help="folder to write (default: the package's own)")
    p.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "laconic-nano", help="log and checkpoints")
    p.add_argument("--resume", nargs="?", type=Path, const=path(), help="start from the weights in this folder (default: shipped)")
    p.add_argument("--epochs", type=int, default=6, help="times the standard library comes in one pass (default %(default)s)")
    p.add_argument("--eager", action="store_true", help="do not compile: for a machine without a C++ compiler, about a tenth slower")
    p.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="1 to 8 (default %(default)s)")
    a = p.parse_args(arguments)
    hours = a.hours if a.hours is not None else 2.0 if a.quick else math.inf
    if a.threads < 1 or a.tokens < 1 or a.epochs < 1 or hours <= 0:
        p.error("--threads, --tokens, --epochs and --hours must be above 0")
    if not 0 <= a.begun < a.tokens or (a.begun and not a.resume):
        p.error("--begun counts tokens of --tokens, and goes with --resume")
    # found out now rather than after hours of training
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(a.out.parent, os.W_OK):
        p.error(f"{a.out.parent} cannot be written to; give another folder with --out")
    a.scratch.mkdir(parents=True, exist_ok=True)
    (a.scratch / "FINISH").unlink(missing_ok=True)
    import torch
    from transformers import AttentionInterface

    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"training nano needs torch.optim.Muon, which torch {torch.__version__} lacks; install torch 2.9 or later")
    recipe = Recipe(tokens=a.tokens, hours=hours, begun=a.begun)

    def say(line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with (a.scratch / "train.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    before: dict[str, Any] = {"tokens": 0, "runs": []}
    if a.resume:
        model, tokenizer, before = load(a.resume)
        recipe = replace(recipe, warmup=50)
    sources, counts = corpus.training()
    say(f"{len(sources)} files, {sum(len(s.text) for s in sources):,} characters; left out: {counts}")
    if not a.resume:
        # the held-out text is standard library, so the vocabulary leans that way too
        texts = [s.text for s in sources if s.package == "stdlib"] * 2 + [s.text for s in sources[::3]]
        tokenizer, model = train_tokenizer(texts), new_model(Shape())
    documents = encode(sources, tokenizer, a.epochs)
    say(f"{sum(len(d) * times for d, times in documents):,} tokens in one pass")

    def record(seen: int, minutes: float, finished: bool = False) -> dict[str, Any]:
        run = {**asdict(recipe), "hours": None if math.isinf(hours) else hours, "seen": seen, "minutes": round(minutes, 1)}
        run["finished"] = finished
        return {"tokens": before["tokens"] + seen, "runs": [*before["runs"], run], "epochs": a.epochs, "corpus": counts}

    AttentionInterface.register("laconic-rows", attend)
    model.set_attn_implementation("laconic-rows")
    search = [t for _, t in corpus.named("search")]
    seen, minutes = fit(
        model,
        Stream(documents, seed=before["tokens"]),
        recipe,
        a.threads,
        a.scratch,
        lambda m: held_out_loss(m, tokenizer, search, 512, 32 * 512),
        lambda m, seen, minutes: write_folder(m, tokenizer, a.scratch / "model", record(seen, minutes)),
        say,
        compiled=not a.eager,
    )
    final = record(seen, minutes, finished=True)
    write_folder(model, tokenizer, a.scratch / "model", final)
    final["losses"] = measure(a.scratch / "model")
    say(f"{final['tokens']:,} tokens over all runs; held-out losses {final['losses']}")
    if a.quick:
        shipped = json.loads((path() / "training.json").read_text(encoding="utf-8")) if (path() / "training.json").is_file() else {}
        there = shipped.get("losses", {}).get("certify", {}).get("512")
        against = f"; the shipped model, {shipped['tokens']:,} tokens, has {there:.4f}" if there else ""
        say(
            f"--quick saw {seen / FULL:.0%} of the {FULL:,} tokens of a full run: "
            f"loss {final['losses']['certify']['512']:.4f} nats per token on certify{against}"
        )
    write_folder(model, tokenizer, a.out, final)
    say(f"wrote {a.out}")


if __name__ == "__main__":
    main()
