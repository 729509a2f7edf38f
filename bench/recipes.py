"""What each named scheme does to small models of four kinds: `python -m bench.recipes` runs `laconic compress MODEL --recipe SCHEME` for
each pair and writes bench/results/recipes.json and recipes.md.

Rows that are kept under a hash of model, code and recipe are not made again. `--data` is the folder of the real weights and images that
stories260k and ResNet-20 need; without it their rows are left out, and said so."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality import SOURCE, key_of, model_hash, relevant, say
from laconic.sources import hash_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCHEMES = ("w8a8", "w4a8", "w4a8-channel", "w4a16", "w3a16", "w3a16-channel", "w2a16", "fp8", "nvfp4", "mxfp4", "ptq161")
FOLDER = "LACONIC_DATA"

Row = dict[str, Any]


# ---- models


@dataclass(frozen=True)
class Subject:
    """A model as the command line takes it. needs: files below the folder of real data; DATA in an argument stands for that folder."""

    title: str
    spec: str
    data: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


SUBJECTS: Mapping[str, Subject] = {
    "nano": Subject("nano (Llama, 7.3 M)", ""),
    "stories260k": Subject(
        "stories260k (Llama, 0.26 M)",
        "DATA/stories260k",
        ("--data", "DATA/text/tinystories_1000.jsonl.gz"),
        ("stories260k/model.safetensors", "text/tinystories_1000.jsonl.gz"),
    ),
    "mamba": Subject("mamba (1.4 M)", "zoo/models/mamba"),
    "resnet20": Subject(
        "ResNet-20 (0.27 M)",
        "bench.recipes:resnet20",
        ("--data", "bench.recipes:train", "--data-certify", "bench.recipes:test"),
        ("resnet_cifar10/resnet20.safetensors", "cifar10/cifar10_10k_1k.npz"),
    ),
}


def real() -> Path:
    """The folder of real data that the environment names."""
    return Path(os.environ[FOLDER])


def resnet20() -> Any:
    """ResNet-20 with its trained weights."""
    from safetensors.torch import load_file

    from laconic.claims.lab import ResNet

    model = ResNet()
    # the file leaves out how many batches the norms have seen
    model.load_state_dict(load_file(real() / "resnet_cifar10" / "resnet20.safetensors"), strict=False)
    return model.eval()


def _images(part: str, count: int) -> Any:
    import numpy as np
    import torch

    from laconic.claims.lab import normal

    with np.load(real() / "cifar10" / "cifar10_10k_1k.npz") as stored:
        return normal(torch.from_numpy(stored[f"{part}_x"][:count])), torch.from_numpy(stored[f"{part}_y"][:count]).long()


def train() -> Any:
    """4,000 images to calibrate and search on."""
    return _images("train", 4000)


def test() -> Any:
    """The 1,000 test images."""
    return _images("test", 1000)


# ---- rows


def code_hash(scheme: str) -> str:
    """Of the code and the recipe that a row's figures depend on."""
    return hash_of(relevant([scheme]))


def filled(words: Iterable[str], data: Path | None) -> list[str]:
    """Arguments with the folders of this machine in them."""
    return [
        word.replace("DATA", str(data)) if "DATA" in word else str(SOURCE / word) if word.startswith("zoo/") else word for word in words
    ]


def command(subject: Subject, scheme: str) -> list[str]:
    """The arguments of `laconic`, without this machine's folders."""
    model = [subject.spec] if subject.spec else []
    return ["compress", *model, *subject.data, "--recipe", scheme, "-o", "OUT"]


def make(subject: Subject, scheme: str, data: Path | None, threads: int) -> Row:
    """One run of the command line; its certificate and measurements as a row."""
    clean = os.environ | {"OMP_NUM_THREADS": str(threads), FOLDER: str(data), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="laconic-bench-") as scratch:
        out = Path(scratch) / "out"
        words = [str(out) if word == "OUT" else word for word in filled(command(subject, scheme), data)]
        done = subprocess.run(
            [sys.executable, "-m", "laconic", *words], env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()]
            return {"reason": last[-1] if last else f"exit code {done.returncode}"}
        certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
        measured = json.loads((out / "measurements.json").read_text(encoding="utf-8"))
        notes = json.loads((out / "plan.json").read_text(encoding="utf-8"))["notes"]
    names = ("kl_mean", "kl_mean_low", "kl_mean_high", "top1_agreement", "perplexity", "perplexity_original", "accuracy",
             "accuracy_original", "bits_per_weight", "bytes", "bytes_original")  # fmt: skip
    quality = certificate["quality"]
    agreement = {end: certificate["details"]["top1_agreement"][end] for end in ("low", "high")}
    return {
        **{name: quality[name] for name in names if name in quality},
        "top1_agreement_low": agreement["low"],
        "top1_agreement_high": agreement["high"],
        "count": certificate["details"]["top1_agreement"]["n"],
        "seconds": measured["seconds"]["total"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "versions": certificate["versions"],
        "processor": measured["hardware"]["processor"],
        "threads": threads,
        "notes": notes,
    }


def rows(subjects: Sequence[str], schemes: Sequence[str], data: Path | None, kept: Sequence[Row], threads: int) -> Iterator[Row]:
    """A row for each pair, made where it is not kept."""
    by_key = {row["key"]: row for row in kept if "key" in row}
    for name in subjects:
        subject = SUBJECTS[name]
        for scheme in schemes:
            key = key_of("recipes", name, model_of(subject, data), code_hash(scheme), command(subject, scheme))
            row = {"model": name, "scheme": scheme, "command": shlex.join(["laconic", *command(subject, scheme)])}
            missing = [need for need in subject.needs if data is None or not (data / need).is_file()]
            if key in by_key:
                yield by_key[key]
            elif missing:
                yield row | {"reason": f"{missing[0]} is not here; name its folder with --data"}
            else:
                yield row | {"key": key} | make(subject, scheme, data, threads)


def model_of(subject: Subject, data: Path | None) -> str:
    """A hash of the weights that a model is read from, of a factory's of the files that it needs."""
    from laconic.zoo import nano

    folder = Path(filled([subject.spec], data)[0]) if subject.spec else nano.path()
    if folder.is_dir():
        return model_hash(folder)
    return key_of(*(hash_of([data / need], data) for need in subject.needs if data is not None and (data / need).is_file()))


# ---- the page


def cell(row: Row | None) -> str:
    """KL, the same first choice, bits."""
    if row is None:
        return "not run yet"
    if "reason" in row:
        return row["reason"]
    return f"{row['kl_mean']:.3g}, {row['top1_agreement']:.1%}, {row['bits_per_weight']:.2f}"


def page(found: Sequence[Row]) -> str:
    """recipes.md."""
    at = {(row["model"], row["scheme"]): row for row in found}
    models = [name for name in SUBJECTS if any(row["model"] == name for row in found)]
    lines = [
        "# The named schemes on four small models",
        "",
        "`laconic compress MODEL --recipe SCHEME -o OUT`, no other option. A cell: KL of the original to the result in nats a prediction,",
        "share of predictions whose first choice is the original's, stored bits a weight (all parameters counted), on data that the run",
        "did not see. Made by `python -m bench.recipes`; commands, intervals, seconds and memory stand in recipes.json.",
        "",
        "| scheme | " + " | ".join(SUBJECTS[name].title for name in models) + " |",
        "| --- |" + " --- |" * len(models),
    ]
    lines += [f"| `{scheme}` | " + " | ".join(cell(at.get((name, scheme))) for name in models) + " |" for scheme in SCHEMES]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.recipes", description="what each named scheme does to four small models")
    parser.add_argument("--models", default=",".join(SUBJECTS), help="names with commas between")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="names with commas between")
    parser.add_argument("--data", default=os.environ.get(FOLDER), type=Path, help=f"folder of the real weights and images ({FOLDER})")
    parser.add_argument("--out", default=RESULTS / "recipes.json", type=Path, help="recipes.md is written beside it")
    parser.add_argument("--threads", default=os.cpu_count() or 1, type=int, help="threads of a run")
    args = parser.parse_args(argv)
    models, schemes = args.models.split(","), args.schemes.split(",")
    for names, known, what in ((models, SUBJECTS, "model"), (schemes, SCHEMES, "scheme")):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")
    data = args.data.resolve() if args.data is not None else None
    kept: list[Row] = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.is_file() else []
    for row in rows(models, schemes, data, kept, args.threads):
        say(f"{row['model']} {row['scheme']}: {cell(row)}")
        others = [one for one in kept if (one["model"], one["scheme"]) != (row["model"], row["scheme"])]
        kept = sorted([*others, row], key=lambda one: (list(SUBJECTS).index(one["model"]), SCHEMES.index(one["scheme"])))
        # each row as it comes: a run that is stopped goes on
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"format": 1, "command": "python -m bench.recipes", "rows": kept}, indent=1) + "\n", encoding="utf-8"
        )
        args.out.with_suffix(".md").write_text(page(kept), encoding="utf-8")
    say(f"{args.out} and {args.out.with_suffix('.md').name} are written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
