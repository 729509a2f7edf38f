"""GPTQ of a large model: laconic beside GPTQModel, on the same weights and calibration tokens, one after the other.

    python -m bench.gptq [--folder DIR] [--layers 1] [--threads 2]

A randomly initialised Llama of 1.2 billion parameters (time and memory do not depend on the values), the matrices of its blocks to 4 bits
in groups of 128, 64 x 512 tokens. Ours is the whole command: opening, calibration, writing, the reload check and the measurement; of
GPTQModel's, loading, quantizing and saving, and its quantizing alone is told too. Peak: resident bytes of the process tree."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.memory import make, watched
from bench.quality import PEERS

ROWS, LENGTH = 64, 512
RECIPE = """says: GPTQ in groups of 128, nothing else
search: search.allocate.uniform
judge: false
choices:
  - method: quantize.round.gptq
    kinds: [linear]
    levels:
      - {bits: 4, group: 128}
keep: '(.*\\.)?(lm_head|embed_tokens)'
"""
PEER = """
import json, os, sys, time
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", sys.argv[4])
import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig
model = GPTQModel.load(sys.argv[1], QuantizeConfig(bits=4, group_size=128, offload_to_disk=False), device="cpu")
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(sys.argv[2])]
start = time.perf_counter()
model.quantize(rows, batch_size=8)
seconds = time.perf_counter() - start
model.save(sys.argv[3])
print("\\n" + json.dumps({"quantizing": seconds}))
"""


def told(code: int, seconds: float, peak: int, **more: Any) -> dict[str, Any]:
    """A run as it is printed."""
    return {"exit": code, "seconds": round(seconds, 1), "peak_memory_bytes": peak, **more}


def compressed(folder: Path) -> None:
    """Our run, in the process that is watched: everything that `laconic compress` does."""
    from laconic.job import compress
    from laconic.kernels.memory import give_back
    from laconic.models import open_model
    from laconic.recipe import load_recipe

    give_back()
    (folder / "gptq.yaml").write_text(RECIPE)
    source = open_model(folder / "model")
    recipe = load_recipe(str(folder / "gptq.yaml"))
    compress(source, split_of(source), budget=[], recipe=recipe, out=folder / "ours", overwrite=True)


def split_of(source: Any) -> Any:
    """Python's own modules as rows of tokens, as many for calibration as are compared."""
    from laconic.data import Texts, open_data
    from laconic.zoo import corpus

    texts = Texts(**{part: [text for _, text in corpus.named(part)] for part in corpus.LISTS}, record={})
    return open_data(None, source, seed=0, length=LENGTH, limits=(ROWS, 1, 4), default=lambda: texts)


def ours(folder: Path, threads: int) -> dict[str, Any]:
    """laconic in a process of its own."""
    command = [sys.executable, "-m", "bench.gptq", "--folder", str(folder), "--ours"]
    code, _, seconds, peak = watched(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    made = code == 0 and json.loads((folder / "ours" / "certificate.json").read_text())
    return told(code, seconds, peak, **({"bits_per_weight": made["bits_per_weight"]} if made else {}))


def theirs(folder: Path, tokens: Path, threads: int) -> dict[str, Any]:
    """GPTQModel in its own environment, or why not."""
    python = PEERS / ".venv-gptqmodel" / "bin" / "python"
    if not python.exists():
        return {"reason": "not installed; bench/peers/install.sh gptqmodel does it"}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-c", PEER, str(folder / "model"), str(tokens), str(folder / "theirs"), str(threads)]
    code, said, seconds, peak = watched(command, env=clean | {"OMP_NUM_THREADS": str(threads)}, cwd=folder)
    alone = json.loads(said.splitlines()[-1]) if code == 0 else {}
    return told(code, seconds, peak, **alone)


def main() -> int:
    """Makes the model if it is not there, runs both, prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "laconic-bench-1b")
    parser.add_argument("--layers", type=int, help="fewer than its 16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.ours:
        compressed(folder)
        return 0
    if not (folder / "model" / "model.safetensors.index.json").is_file():
        make(folder / "model", "1b", given.layers)
    import numpy as np

    from laconic.models import open_model

    tokens = folder / "tokens.npy"
    np.save(tokens, split_of(open_model(folder / "model")).calibrate.inputs.numpy())
    found = {"ours": ours(folder, given.threads), "GPTQModel": theirs(folder, tokens, given.threads)}
    print(json.dumps(found, indent=1))
    return max(run.get("exit", 0) for run in found.values())


if __name__ == "__main__":
    sys.exit(main())
