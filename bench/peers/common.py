"""Shared by the peer scripts: arguments, the clock, unpacking of integer codes, and the two output files."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

# two scripts bear the name of the package they run: with their folder out of the way, later imports find the packages
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

# glibc returns every large block to the kernel and faults it in again; short training loops then spend their time there
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def arguments(description: str, *, types: tuple[str, ...] = ()) -> argparse.Namespace:
    """The command line that all peers share; a tool with named formats takes `--type` in place of `--bits` and `--group`."""
    if not all(name in os.environ for name in _MALLOC):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**_MALLOC, **os.environ})
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, type=Path, help="folder of the original model")
    parser.add_argument("--calibration", required=True, type=Path, help="tokens, int64, .npy of (sequences, length)")
    if types:
        parser.add_argument("--type", required=True, choices=types)
    else:
        parser.add_argument("--bits", required=True, type=int, choices=(2, 3, 4, 8))
        parser.add_argument("--group", required=True, type=int, help="weights along the input that share a scale")
        parser.add_argument("--asymmetric", action="store_true", help="with a zero point")
    parser.add_argument("--best", action="store_true", help="the tool's own best recipe")
    parser.add_argument("--whole-file", action="store_true", help="embedding and head too, where the tool can")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        refuse(f"{args.model} holds no config.json; --model takes a Hugging Face folder.")
    return args


def refuse(sentence: str) -> None:
    """Exit with code 3: the peer cannot do what was asked, for the reason given."""
    print(sentence, file=sys.stderr)
    sys.exit(3)


def read_tokens(path: Path) -> torch.Tensor:
    tokens = np.load(path)
    if tokens.ndim != 2 or tokens.dtype != np.int64:
        refuse(f"{path} has shape {tokens.shape} and dtype {tokens.dtype}; calibration is int64 of (sequences, length).")
    return torch.from_numpy(tokens)


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return tensors


def load_model(folder: Path, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def is_block_linear(name: str, tensor: torch.Tensor) -> bool:
    """A checkpoint's matrix inside a block; name is the tensor's, with `.weight`."""
    return ".layers." in name and name.endswith(".weight") and tensor.ndim == 2


@contextlib.contextmanager
def clock():
    """Wall and processor seconds of the quantization alone: no imports, no loading, no saving."""
    spent = SimpleNamespace(wall=0.0, cpu=0.0)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield spent
    spent.wall, spent.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextlib.contextmanager
def scratch(out: Path):
    """A folder beside the output for the tool's own file; gone afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="tool-") as folder:
        yield Path(folder)


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (.., 32 k / bits) out of int32 words (.., k) that hold them one after the other from the lowest bit."""
    values = words.to(torch.int64) & 0xFFFFFFFF
    stream = (values[..., None] >> torch.arange(32)) & 1
    stream = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (stream << torch.arange(bits)).sum(-1)


def gptq_weight(packed: dict[str, torch.Tensor], bits: int, *, zero_shift: int = 1) -> torch.Tensor:
    """The (n, m) fp32 weight that one layer of a GPTQ checkpoint stands for.

    qweight is packed down the input, qzeros along the output; GPTQ v1 stores each zero less one, later layouts (shift 0) as it is.
    """
    codes = unpack_bits(packed["qweight"].T.contiguous(), bits)
    zeros = (unpack_bits(packed["qzeros"], bits) + zero_shift) % 2**bits
    groups, length = packed["scales"].shape[0], codes.shape[1]
    owner = packed.get("g_idx", torch.arange(length) // (length // groups)).long()
    return ((codes - zeros.T[:, owner]).float() * packed["scales"].T.float()[:, owner]).contiguous()


def check_levels(name: str, weight: torch.Tensor, levels: int, group: int) -> None:
    """Refuse weights that take more values in a group of a row than the format can name."""
    rows = weight.float().reshape(-1, group).sort(dim=-1).values
    most = 1 + int((rows.diff(dim=-1) != 0).sum(-1).max())
    if most > levels:
        raise ValueError(f"{name} takes {most} values in a group of {group}, the format has {levels}: not the tool's own weights.")


def finish(args: argparse.Namespace, weights: dict[str, torch.Tensor], spent: SimpleNamespace, **report) -> None:
    """Write the dequantized model and peer.json; `weights` replaces the original's tensors of the same names."""
    original = read_checkpoint(args.model)
    config = json.loads((args.model / "config.json").read_text())
    tied = config.get("tie_word_embeddings", False)
    extra = {"lm_head.weight"} if tied else set()
    for name, weight in weights.items():
        like = original.get(name, original.get("model.embed_tokens.weight") if name in extra else None)
        if like is None or like.shape != weight.shape or not torch.isfinite(weight).all():
            raise ValueError(f"{name} {tuple(weight.shape)} is no tensor of {args.model}, or not finite.")
    # a head quantized apart from its embedding no longer shares it
    config["tie_word_embeddings"] = tied and "lm_head.weight" not in weights
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = "float32"
    blocks = {name for name, tensor in original.items() if is_block_linear(name, tensor)}
    skipped = sorted(blocks - weights.keys())
    quantized = sorted(blocks & weights.keys())
    errors = [float((weights[name] - original[name].float()).norm() / original[name].float().norm()) for name in quantized]
    # a misread layout gives unrelated weights, at 1.4
    if not errors or max(errors) > 1:
        raise ValueError(f"relative error {max(errors, default=float('nan')):.2f} to the original weights: the layout was misread.")
    for name in quantized:
        change = weights[name] - original[name].float()
        # a zero read one off moves all weights the same way by a whole step
        if abs(float(change.mean())) > 0.5 * float(change.square().mean().sqrt()):
            raise ValueError(f"{name} moved as a whole, by {float(change.mean()):.2g}: its zero points were misread.")

    args.out.mkdir(parents=True, exist_ok=True)
    for file in args.model.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and "safetensors" not in file.name:
            shutil.copyfile(file, args.out / file.name)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    complete = {name: weights.get(name, tensor).to(torch.float32).contiguous() for name, tensor in {**original, **weights}.items()}
    save_file(complete, args.out / "model.safetensors", metadata={"format": "pt"})

    for key in [key for key in report if key.startswith("bytes_linears")]:
        report[key] += sum(2 * original[name].numel() for name in skipped)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    record = {
        "version": importlib.metadata.version(report["tool"]),
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "relative_error": round(sum(errors) / len(errors), 5),
        "skipped_layers": [name.removesuffix(".weight") for name in skipped],
        "seconds_wall": round(spent.wall, 3),
        "seconds_cpu": round(spent.cpu, 3),
        "peak_memory_bytes": 1024 * sum(peaks),
        **report,
    }
    (args.out / "peer.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{record['tool']} {record['version']}: {record['bytes_linears']} bytes in {record['seconds_cpu']} processor seconds")
