"""Train `mamba`, a small state-space language model: `python -m laconic.zoo.mamba [--minutes M] [--tokens N] [--out FOLDER]`.

Mamba as transformers builds it, 1.4 M parameters in 2.7 MB, byte-level BPE of 1,024, an embedding and a head of its own, trained on the
standard library's sources as `laconic.zoo.nano` is, by the same steps: Muon for the projections, AdamW for the rest. The scan runs as
`laconic.kernels.scan`, which is some times faster in training than transformers' own without a graphics card. Half an hour of two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.core.errors import UserError
from laconic.zoo import corpus
from laconic.zoo.nano import BOS, Recipe, Stream, encode, fit, held_out_loss, load, train_tokenizer, write_folder

if TYPE_CHECKING:
    import torch

VOCABULARY, HIDDEN, LAYERS, STATES, RANK = 1024, 192, 4, 8, 12
SCORED = 1 << 15
FULL = 20_000_000
# of the layers, what Muon moves
PROJECTIONS = r".*\.(in_proj|x_proj|out_proj)\.weight"


def path() -> Path:
    """Return the folder of the shipped model, an ordinary Hugging Face folder."""
    return Path(__file__).parent / "models" / "mamba"


def new_model(seed: int = 0) -> torch.nn.Module:
    """Return a fresh fp32 MambaForCausalLM whose residual outputs start small."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=STATES,
        time_step_rank=RANK,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    # transformers draws from the global generator: seeded here, given back as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(config)


def opened(model: Any) -> Any:
    """Put the mixer whose scan has a fast gradient in each layer of a model; its parameters stay where they are, under their names."""
    from laconic.methods.quantize.rotate.mixer import Mixer

    for layer in model.base_model.layers:
        mixer = Mixer()
        mixer.over(layer.mixer)
        layer.mixer = mixer
    return model


def plain(model: Any) -> Any:
    """Return transformers' own model with the weights of an opened one."""
    new: Any = new_model()
    new.load_state_dict(model.state_dict())
    return new


def card(record: dict[str, Any]) -> str:
    """Return the model card that states a training record."""
    run = record["run"]
    losses = "\n".join(f"| {name} | {loss:.4f} | {math.exp(loss):.2f} |" for name, loss in record.get("losses", {}).items())
    left = record["corpus"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: [code]
tags: [laconic, code, python, mamba]
tokens_seen: {record["tokens"]}
---
# mamba

A small state-space language model of Python source code: a subject for methods that act on Mamba.

## Architecture

Mamba (`MambaForCausalLM`): {LAYERS} layers, hidden {HIDDEN}, {2 * HIDDEN} channels of {STATES} states, steps of rank {RANK}, an embedding
and a head of its own, {record["parameters"]:,} parameters stored in bf16. Byte-level BPE of {VOCABULARY:,} with one special token, `{BOS}`
(id 0), which opens every document.

## Data

The Python standard library with its tests: {record["files"]:,} files, {record["characters"]:,} characters. Left out: the
{left["held out"]} held-out modules of `laconic.zoo.corpus`, duplicates, tables, and files that share over 5 % of their 50-character windows
with a held-out module.

## Training

{record["tokens"]:,} tokens in {run["minutes"]:.0f} minutes, {run["batch"]:,} a step in rows of {run["short"]}. Muon for the projections
(rate {run["muon"]}), AdamW for all else ({run["adamw"]}), gradient norm clipped at 1; linear warm-up, stable, linear decay to zero over the
last quarter. It has seen little text, and an under-trained model is easier to quantize than a finished one.

Retrain with `python -m laconic.zoo.mamba`.

## Held-out loss

{SCORED:,} tokens of each list, 512 tokens of context. Weights as stored (bf16), arithmetic in fp32.

| list | loss (nats per token) | perplexity |
| --- | --- | --- |
{losses}

## Intended use

A subject for compression methods, tests and demonstrations; no source of correct code.

## Licence note

The weights come under laconic's licence, Apache-2.0. The training text stays under its own, PSF-2.0. Short passages of it may be repeated
by the model.
"""


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    p = argparse.ArgumentParser(
        prog="python -m laconic.zoo.mamba", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=30, help="end after this many minutes (default %(default)s)")
    p.add_argument("--tokens", type=int, default=FULL, help="end after this many tokens (default %(default)s)")
    p.add_argument("--out", type=Path, default=path(), help="folder to write (default: the package's own)")
    p.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "laconic-mamba", help="checkpoints")
    p.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="1 to 8 (default %(default)s)")
    a = p.parse_args(arguments)
    if a.threads < 1 or a.tokens < 1 or a.minutes <= 0:
        p.error("--threads, --tokens and --minutes must be above 0")
    # found out now rather than after the training
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(a.out.parent, os.W_OK):
        p.error(f"{a.out.parent} cannot be written to; give another folder with --out")
    a.scratch.mkdir(parents=True, exist_ok=True)
    import torch

    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"training needs torch.optim.Muon, which torch {torch.__version__} lacks; install torch 2.9 or later")

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    everything, counts = corpus.training()
    sources = [s for s in everything if s.package.startswith("stdlib")]
    characters = sum(len(s.text) for s in sources)
    say(f"{len(sources)} files, {characters:,} characters")
    tokenizer = train_tokenizer([s.text for s in sources if s.package == "stdlib"], VOCABULARY)
    documents = encode(sources, tokenizer, epochs=3)
    recipe = Recipe(tokens=a.tokens, hours=a.minutes / 60, batch=4096, short=256, micro=1024, muon=0.01, adamw=0.004, warmup=40)
    model = opened(new_model())
    parameters = sum(x.numel() for x in model.parameters())

    def record(seen: int, minutes: float) -> dict[str, Any]:
        made = {**asdict(recipe), "minutes": round(minutes, 1)}
        return {"tokens": seen, "parameters": parameters, "files": len(sources), "characters": characters, "run": made, "corpus": counts}

    texts = {name: [t for _, t in corpus.named(name)] for name in ("search", "certify")}
    seen, minutes = fit(
        model,
        Stream(documents, seed=0),
        recipe,
        a.threads,
        a.scratch,
        lambda m: held_out_loss(m, tokenizer, texts["search"], 512, 8 * 512),
        lambda m, seen, minutes: write_folder(plain(m), tokenizer, a.scratch / "model", record(seen, minutes), card),
        say,
        compiled=False,
        hidden=PROJECTIONS,
    )
    final = record(seen, minutes)
    write_folder(plain(model), tokenizer, a.scratch / "model", final, card)
    stored = opened(load(a.scratch / "model")[0])
    final["losses"] = {name: held_out_loss(stored, tokenizer, found, 512, SCORED) for name, found in texts.items()}
    say(f"{seen:,} tokens; held-out losses {final['losses']}")
    write_folder(plain(model), tokenizer, a.out, final, card)
    say(f"wrote {a.out}")


if __name__ == "__main__":
    main()
