"""Peak memory of compressing a large model: a randomly initialised Llama of 3 billion parameters, round to nearest, 4 bits.

    python -m bench.memory [--folder DIR] [--layers 28]

Writes the model once (6 GB), runs `laconic compress` as a child and prints the peak resident set of its process tree, as the operating
system counts it, interpreter and torch included. The reload check and the measurement on held-out text are part of the run."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# the shapes of Llama 3.2's 1 and 3 billion parameters
SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
           "num_hidden_layers": 16},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
           "num_hidden_layers": 28},
}  # fmt: skip


def make(folder: Path, size: str, layers: int | None = None) -> None:
    """Random weights, one shard a layer, nano's tokenizer. layers: fewer of them."""
    import torch
    from safetensors.torch import save_file

    from laconic.zoo import nano

    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = CONFIG | SIZES[size]
    layers = config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano.path() / name, folder / name)
    d, f, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    for i in range(layers + 1):
        if i < layers:
            shard = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{i}.{norm}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        else:
            shard = {"model.embed_tokens.weight": random(128256, d), "model.norm.weight": torch.ones(d, dtype=torch.bfloat16)}
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its children now."""
    import psutil

    try:
        root = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def watched(command: Sequence[str], **more: Any) -> tuple[int, bytes, float, int]:
    """Runs a command -> its exit code, what it wrote, seconds, and the peak resident bytes of its process tree."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, **more)
        while child.poll() is None:
            peak = max(peak, tree_bytes(child.pid))
            time.sleep(0.05)
        said.seek(0)
        return child.returncode, said.read(), time.monotonic() - start, peak


def main() -> None:
    """Makes the model if it is not there, compresses it, prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "laconic-bench-3b")
    parser.add_argument("--layers", type=int, help="fewer than its 28")
    parser.add_argument("--budget", default="bits=4.3")
    parser.add_argument("--recipe", default="rtn")
    given = parser.parse_args()
    model, out = given.folder / "model", given.folder / "out"
    if not (model / "model.safetensors.index.json").is_file():
        make(model, "3b", given.layers)
    chosen = ["--recipe", given.recipe, "--budget", given.budget, "-o", str(out), "--overwrite"]
    command = [sys.executable, "-m", "laconic", "compress", str(model), *chosen]
    code, said, seconds, peak = watched([*command, "--json"])
    answer = json.loads(said)["certificate"] if code == 0 else {}
    print(
        json.dumps({
            "command": " ".join(command[1:]), "exit": code, "seconds": round(seconds, 1),
            "peak_memory_bytes": peak,
            "bits_per_weight": answer.get("bits_per_weight"), "reload": answer.get("reload"),
        }, indent=1)
    )  # fmt: skip
    sys.exit(code)


if __name__ == "__main__":
    main()
