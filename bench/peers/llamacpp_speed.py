"""llama.cpp's speed on a folder's model: a worker of bench.decode (a line in is a turn, a line out seconds a token)."""

import argparse
import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path

import common
import llama_cpp
import torch

_SPEC = importlib.util.spec_from_file_location("llamacpp", Path(__file__).with_name("llamacpp.py"))
llamacpp = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(llamacpp)


def convert(model: Path, scratch: Path, kind: str) -> Path:
    """The model as a GGUF of `kind`, every matrix in it; made once."""
    plain, target = scratch / "stack.gguf", scratch / f"stack-{kind}.gguf"
    config = json.loads((model / "config.json").read_text())
    if not plain.exists():
        llamacpp.write_gguf(model, common.read_checkpoint(model), config, plain)
    if not target.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread = torch.get_num_threads()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{llamacpp.RECIPE_OF.get(kind, kind)}")
        settings.pure = True
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp could not quantize to {kind}; its message stands above.")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--type", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    path = convert(args.model, args.scratch, args.type)
    llama = llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False, logits_all=False
    )

    def turn() -> dict[str, float]:
        llama.reset()
        began = time.perf_counter()
        llama.eval(list(range(100, 100 + args.prompt)))
        read = time.perf_counter()
        for i in range(args.tokens):
            llama.eval([1000 + i])
        return {"prefill": (read - began) / args.prompt, "decode": (time.perf_counter() - read) / args.tokens}

    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


if __name__ == "__main__":
    main()
