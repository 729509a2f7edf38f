"""Training of the zoo's small models: of those of text, each in half an hour of two cores, on the standard library's sources, and of those
of digits, in minutes of one: what they have in common."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from laconic.core.errors import UserError
from laconic.zoo import corpus
from laconic.zoo.nano import BOS, Recipe, Stream, encode, fit, held_out_loss, load, train_tokenizer, write_folder

if TYPE_CHECKING:
    import torch

Trained = TypeVar("Trained", bound="torch.nn.Module")

SCORED = 1 << 15
FULL = 20_000_000


def path(name: str) -> Path:
    """Return the folder of a shipped model, an ordinary Hugging Face folder."""
    return Path(__file__).parent / "models" / name


@dataclass(frozen=True)
class Subject:
    """A small model: how it is made, what it learns, and what its card says of it.

    loss: (model, ids [b, t + 1]) -> nats a prediction; projections: of the layers, what Muon moves; auto: transformers' class that reads
    it; marks: special tokens besides BOS by what they are for; opened, plain: to the module that learns, and back to transformers' own;
    context: tokens of the held-out loss; epochs: times the standard library comes in a pass; learned: a sentence on the task."""

    name: str
    title: str
    architecture: str
    task: str
    learned: str
    vocabulary: int
    marks: Mapping[str, str]
    auto: str
    new_model: Callable[[], Any]
    loss: Callable[[Any, torch.Tensor], torch.Tensor]
    projections: str
    recipe: Recipe
    context: int
    epochs: int = 3
    opened: Callable[[Any], Any] = lambda model: model
    plain: Callable[[Any], Any] = lambda model: model

    def card(self, record: dict[str, Any]) -> str:
        """Return the model card that states a training record."""
        run = record["run"]
        losses = "\n".join(f"| {name} | {loss:.4f} | {math.exp(loss):.2f} |" for name, loss in record.get("losses", {}).items())
        left = record["corpus"]
        return f"""---
library_name: transformers
pipeline_tag: {self.task}
license: apache-2.0
language: [code]
tags: [laconic, code, python, {self.name}]
tokens_seen: {record["tokens"]}
---
# {self.name}

{self.title}

## Architecture

{self.architecture.format(parameters=record["parameters"])}

## Data

The Python standard library with its tests: {record["files"]:,} files, {record["characters"]:,} characters. Left out: the
{left["held out"]} held-out modules of `laconic.zoo.corpus`, duplicates, tables, and files that share over 5 % of their 50-character windows
with a held-out module.

## Training

{record["tokens"]:,} tokens in {run["minutes"]:.0f} minutes, {run["batch"]:,} a step in rows of {run["short"]}.{self.learned} Muon for the \
projections
(rate {run["muon"]}), AdamW for all else ({run["adamw"]}), gradient norm clipped at 1; linear warm-up, stable, linear decay to zero over the
last quarter. It has seen little text, and an under-trained model is easier to quantize than a finished one.

Retrain with `python -m laconic.zoo.{self.name}`.

## Held-out loss

{SCORED:,} tokens of each list, {self.context} tokens of context. Weights as stored (bf16), arithmetic in fp32.

| list | loss (nats per token) | perplexity |
| --- | --- | --- |
{losses}

## Intended use

A subject for compression methods, tests and demonstrations; no source of correct code.

## Licence note

The weights come under laconic's licence, Apache-2.0. The training text stays under its own, PSF-2.0. Short passages of it may be repeated
by the model.
"""

    def main(self, description: str | None, arguments: list[str] | None = None) -> None:
        """Train from the command line."""
        p = argparse.ArgumentParser(
            prog=f"python -m laconic.zoo.{self.name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.add_argument("--minutes", type=float, default=30, help="end after this many minutes (default %(default)s)")
        p.add_argument("--tokens", type=int, default=self.recipe.tokens, help="end after this many tokens (default %(default)s)")
        p.add_argument("--out", type=Path, default=path(self.name), help="folder to write (default: the package's own)")
        p.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / f"laconic-{self.name}", help="checkpoints")
        p.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="1 to 8 (default %(default)s)")
        a = p.parse_args(arguments)
        if a.threads < 1 or a.tokens < 1 or a.minutes <= 0:
            p.error("--threads, --tokens and --minutes must be above 0")
        _ready(p, a)
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"training needs torch.optim.Muon, which torch {torch.__version__} lacks; install torch 2.9 or later")
        self._train(a.minutes, a.tokens, a.out, a.scratch, a.threads)

    def _train(self, minutes: float, tokens: int, out: Path, scratch: Path, threads: int) -> None:
        everything, counts = corpus.training()
        sources = [s for s in everything if s.package.startswith("stdlib")]
        characters = sum(len(s.text) for s in sources)
        say(f"{len(sources)} files, {characters:,} characters")
        tokenizer = train_tokenizer([s.text for s in sources if s.package == "stdlib"], self.vocabulary, (BOS, *self.marks.values()))
        documents = encode(sources, tokenizer, epochs=self.epochs)
        recipe = replace(self.recipe, tokens=tokens, hours=minutes / 60)
        model = self.opened(self.new_model())
        parameters = sum(x.numel() for x in model.parameters())

        def record(seen: int, took: float) -> dict[str, Any]:
            made = {**asdict(recipe), "minutes": round(took, 1)}
            return {
                "tokens": seen,
                "parameters": parameters,
                "files": len(sources),
                "characters": characters,
                "run": made,
                "corpus": counts,
            }

        def write(trained: Any, folder: Path, said: dict[str, Any]) -> None:
            write_folder(self.plain(trained), tokenizer, folder, said, self.card, self.marks)

        texts = {name: [t for _, t in corpus.named(name)] for name in ("search", "certify")}
        seen, took = fit(
            model,
            Stream(documents, seed=0),
            recipe,
            threads,
            scratch,
            lambda m: held_out_loss(m, tokenizer, texts["search"], self.context, 8 * 512, self.loss),
            lambda m, seen, took: write(m, scratch / "model", record(seen, took)),
            say,
            compiled=False,
            hidden=self.projections,
            loss=self.loss,
        )
        final = record(seen, took)
        write(model, scratch / "model", final)
        stored = self.opened(load(scratch / "model", self.auto)[0])
        final["losses"] = {name: held_out_loss(stored, tokenizer, found, self.context, SCORED, self.loss) for name, found in texts.items()}
        say(f"{seen:,} tokens; held-out losses {final['losses']}")
        write(model, out, final)
        say(f"wrote {out}")


# ---- digits, in minutes


@dataclass(frozen=True)
class Briefly:
    """Images a step, AdamW's rate and how it rises, in steps, and falls, from a share of the time on."""

    batch: int = 64
    rate: float = 0.003
    warmup: int = 40
    decay_at: float = 0.4


def mnist(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 28, 28) uint8 and digits (n,) of training and test from mnist.npz of a folder; UserError where it is not there."""
    import numpy as np
    import torch

    file = folder / "mnist.npz"
    if not file.is_file():
        raise UserError(f"no {file}: give the folder of mnist.npz (train_x, train_y, test_x, test_y) with --data")
    with np.load(file) as stored:
        return [(torch.from_numpy(stored[f"{part}_x"]), torch.from_numpy(stored[f"{part}_y"]).long()) for part in ("train", "test")]


def by_minutes(
    model: torch.nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    recipe: Briefly,
    minutes: float,
    scratch: Path,
    held_out: Callable[[], float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train a model for so many minutes of the processor, by the loss of a batch that is drawn, and return what the run was. What was
    learned goes to `scratch` each minute, and a run cut short goes on there. A file FINISH there lets the rate fall from then on, for a
    third of what was spent so far."""
    import torch

    generator, kept = torch.Generator().manual_seed(0), scratch / "training.pt"
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    before, step = 0.0, 0
    if kept.is_file():
        stored = torch.load(kept, weights_only=True)
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        before, step = stored["minutes"], stored["step"]
        generator.manual_seed(step)
    began, saved, mean, finish = time.process_time() / 60 - before, time.monotonic(), 0.0, math.inf
    while (spent := time.process_time() / 60 - began) < min(minutes, 4 / 3 * finish):
        done = spent / minutes
        if finish < math.inf:
            done = max(done, recipe.decay_at + (1 - recipe.decay_at) * (spent / finish - 1) * 3)
        elif (scratch / "FINISH").is_file():
            finish = spent
        scale = min(1.0, (step + 1) / recipe.warmup, (1 - done) / (1 - recipe.decay_at))
        found = loss(generator)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = recipe.rate * scale
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        mean += (float(found.detach()) - mean) / min(step, 20)
        if step % 20 == 0:
            say(f"step {step} images {step * recipe.batch:,} done {done:.2f} loss {mean:.4f}")
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            held = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "minutes": spent, "step": step}
            torch.save(held, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
            say(f"held-out {held_out():.4f}")
    return {**asdict(recipe), "steps": step, "images": step * recipe.batch, "minutes": round(time.process_time() / 60 - began, 1)}


def filled(model: Trained, folder: Path, name: str) -> Trained:
    """The model with the weights of a folder, in fp32. UserError where it holds none."""
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{file} is missing: train it with python -m laconic.zoo.{name} --data FOLDER, or install the package anew")
    model.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    model.eval().requires_grad_(False)
    return model


def write_module(
    model: Trained,
    stored: Trained,
    record: Callable[[Trained], dict[str, Any]],
    card: Callable[[dict[str, Any]], str],
    folder: Path,
) -> dict[str, Any]:
    """Write weights in bf16, the record and the card that states it, and return the record. stored: a model of the same kind, which gets
    the weights as stored; what was found of it goes into the record."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    stored.load_state_dict({name: value.float() for name, value in weights.items()})
    found = {"parameters": sum(p.numel() for p in model.parameters()), **record(stored.eval())}
    (folder / "training.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(found), encoding="utf-8")
    return found


def say(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _ready(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Folders of `--out` and `--scratch`, found out now rather than after the training."""
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(a.out.parent, os.W_OK):
        p.error(f"{a.out.parent} cannot be written to; give another folder with --out")
    a.scratch.mkdir(parents=True, exist_ok=True)


def asked(name: str, description: str | None, arguments: Sequence[str] | None, minutes: float) -> argparse.Namespace:
    """What a training of digits is asked for at the command line; its folders are there on return."""
    p = argparse.ArgumentParser(
        prog=f"python -m laconic.zoo.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True, help="folder of mnist.npz")
    p.add_argument("--minutes", type=float, default=minutes, help="end after this many minutes of the processor (default %(default)s)")
    p.add_argument("--out", type=Path, default=path(name), help="folder to write (default: the package's own)")
    p.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / f"laconic-{name}", help="checkpoints")
    a = p.parse_args(arguments)
    if a.minutes <= 0:
        p.error("--minutes must be above 0")
    _ready(p, a)
    (a.scratch / "FINISH").unlink(missing_ok=True)
    return a
