"""Speed of generating with a Llama-shaped stack: laconic's held layers, torch in bf16, llama.cpp's 4-bit formats, in one run.

    python -m bench.decode [--forms int4,int4a8,int8,bf16,q4_0,q4_k,q8_0] [--threads 2] [--rounds 5] [--out FILE]

Width 2,048, feed-forward 5,632, 8 layers, 32 query and 4 KV heads of 64, vocabulary 32,000, random weights: 418 million weights are read
for a token. Each form is a process of its own that waits while the others work; they take turns, --rounds times, and medians are printed.
int*: symmetric codes in groups of 128, head included, embedding in bf16, run by a tape of native steps (`laconic.stepping`); bf16:
transformers' own forward pass with its dynamic cache; bf16t: the same weights run by a tape; bf16s50: 50 % of the neurons, and of the
inputs of q and o, left out for each token (CHESS). int*a8: the same with inputs of products
rounded to 8 bits as they come (llama.cpp rounds them in runs of 32 and 256).
llama.cpp needs `bash bench/peers/install.sh llamacpp`; its files (3 GB) are made once in --scratch and stay there."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT, TOKENS = 128, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(form: str) -> Any:
    """The stack with its linear layers as `form` says: int1 to int8, with a8 behind it for inputs of 8 bits, or bf16."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from laconic.artifact import put, round_inputs
    from laconic.core.packed import Held
    from laconic.kernels.bits import packed_width
    from laconic.kernels.grids import Grid
    from laconic.methods.quantize.grid.grouped import Grouped

    config = LlamaConfig(**{key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    dtype = torch.bfloat16

    def held(layer: nn.Linear, bits: int) -> Held:
        n, m = layer.weight.shape
        grid = Grid(bits, 128, True)
        codes = torch.randint(0, 256, (n, packed_width(m, bits)), dtype=torch.uint8)
        scales = (torch.rand(n, grid.count(m)) * 0.05 / 2**bits).bfloat16()
        return Held(Grouped((n, m), grid, codes, scales, None), layer, None)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype).normal_(0, 0.02), requires_grad=False)

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and form.startswith("int"):
            put(model, name, held(layer, int(form[3])))
        elif isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight = drawn(*layer.weight.shape)
        elif hasattr(layer, "variance_epsilon"):
            layer.weight = nn.Parameter(torch.ones(CONFIG["hidden_size"], dtype=dtype), requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    if form.endswith("a8"):
        round_inputs(model, 8)
    if form.startswith("bf16s"):
        leave_out(model, int(form[5:]) / 100)
    return model.eval()


def leave_out(model: Any, share: float) -> None:
    """CHESS: of each layer so many of the neurons, and of the inputs of q and o, are left out for a token, by what random tokens show."""
    import torch

    from laconic.methods.prune.activation.chess import Inputs, Neurons
    from laconic.routing import begin, install, look

    parts: dict[str, Any] = {}
    for i in range(CONFIG["num_hidden_layers"]):
        within = f"model.layers.{i}"
        parts[f"{within}.mlp"] = Neurons(
            CONFIG["intermediate_size"], share, True, {part: f"{part}_proj" for part in ("gate", "up", "down")}
        )
        for name in ("q", "o"):
            parts[f"{within}.self_attn.{name}_proj"] = Inputs(CONFIG["hidden_size"], share)
    install(model, parts)
    begin(parts, 0)
    look(model, parts, [torch.randint(0, CONFIG["vocab_size"], (2, 64))])


def serve(form: str, threads: int) -> None:
    """A process of one form: a line in is a turn, a line out what it took (JSON: prefill, decode in seconds a token)."""
    import torch
    from transformers.cache_utils import DynamicCache

    from laconic.measurement import timed_generation
    from laconic.stepping import Steps, steps_of

    torch.set_num_threads(threads)
    if not right(form):
        sys.exit("its products are not equal to the reference's")
    model = build(form)
    steps = "a form of torch's own" if form == "bf16" else steps_of(model)
    if isinstance(steps, str) and form != "bf16":
        sys.exit(f"no tape: {steps}")

    @torch.inference_mode()
    def turn() -> dict[str, float]:
        if not isinstance(steps, str):
            ids = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT))
            read, rest = timed_generation(model, ids, TOKENS, Steps(model))
            return {"prefill": read / PROMPT, "decode": rest / TOKENS}
        cache = DynamicCache(config=model.config)
        ids = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT))
        began = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(TOKENS):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
        return {"prefill": (read - began) / PROMPT, "decode": (time.perf_counter() - read) / TOKENS}

    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def right(form: str) -> bool:
    """Whether the products of a form are equal to their reference, for the rows that are timed."""
    import torch

    from bench.linear import NEAR, PRODUCTS, codes
    from laconic.kernels.grids import Grid

    if not form.startswith("int"):
        return True
    grid, (product, reference) = Grid(int(form[3]), 128, True), PRODUCTS[" a8" if form.endswith("a8") else ""]
    w = codes(37, CONFIG["hidden_size"], grid)
    for rows in (1, PROMPT):
        x = torch.randn(rows, CONFIG["hidden_size"])
        want = reference(x, *w, grid)
        if not float((product(x, *w, grid) - want).abs().max() / want.abs().max()) <= NEAR:
            return False
    return True


def stack(folder: Path) -> Path:
    """The stack as a Hugging Face folder, for llama.cpp's own conversion."""
    from safetensors.torch import save_file

    from laconic.zoo import nano

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").exists():
        (folder / "config.json").write_text(json.dumps(CONFIG))
        # llama.cpp opens no model without a tokenizer
        shutil.copy(nano.path() / "tokenizer.json", folder)
        model = build("bf16")
        save_file({name: p.data for name, p in model.named_parameters()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def peer(form: str, scratch: Path, threads: int) -> list[str] | str:
    """The command of a llama.cpp worker, or why there is none."""
    python = HERE / "peers" / ".venv-llamacpp" / "bin" / "python"
    if not python.exists():
        return "bench/peers/.venv-llamacpp is not there: bash bench/peers/install.sh llamacpp"
    script = str(HERE / "peers" / "llamacpp_speed.py")
    where = ["--model", str(stack(scratch / "stack")), "--scratch", str(scratch), "--threads", str(threads)]
    return [str(python), script, "--type", form.upper(), *where, "--prompt", str(PROMPT), "--tokens", str(TOKENS)]


def main() -> None:
    """Prints a table, and writes one JSON object."""
    import psutil

    form_of = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__, formatter_class=form_of)
    parser.add_argument("--forms", default="bf16,bf16t,int8,int8a8,int4,int4a8,int3,int3a8,int2,int2a8,q8_0,q4_0,q4_k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "laconic-bench-decode")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve, a.threads)
        return
    workers: dict[str, subprocess.Popen[str]] = {}
    result: dict[str, Any] = {"config": CONFIG, "threads": a.threads, "prompt": PROMPT, "tokens": TOKENS}
    result |= {"forms": {}, "left_out": {}}
    try:
        for form in a.forms.split(","):
            command: list[str] | str = [sys.executable, "-m", "bench.decode", "--serve", form, "--threads", str(a.threads)]
            if form.startswith("q"):
                command = peer(form, a.scratch, a.threads)
            if isinstance(command, str):
                result["left_out"][form] = command
                continue
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert worker.stdout is not None
            line = next((line for line in worker.stdout if line.strip() == "ready"), "")
            if line:
                workers[form] = worker
            else:
                result["left_out"][form] = worker.communicate()[1].strip().splitlines()[-1:] or ["it ended without a word"]
        took: dict[str, list[dict[str, float]]] = {form: [] for form in workers}
        for _ in range(a.rounds):
            for form, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                took[form].append(json.loads(worker.stdout.readline()))
        for form, worker in workers.items():
            speeds = {key: 1 / statistics.median(turn[key] for turn in took[form]) for key in ("prefill", "decode")}
            result["forms"][form] = {**speeds, "resident_bytes": psutil.Process(worker.pid).memory_info().rss}
    finally:
        for worker in workers.values():
            worker.kill()
    base = result["forms"].get("bf16", {}).get("decode")
    print(f"{'':8s} {'prefill tok/s':>14s} {'decode tok/s':>14s} {'of bf16':>8s} {'resident MB':>12s}")
    for form, found in result["forms"].items():
        ratio = f"{found['decode'] / base:.2f}x" if base else ""
        print(f"{form:8s} {found['prefill']:14.0f} {found['decode']:14.1f} {ratio:>8s} {found['resident_bytes'] / 1e6:12.0f}")
    for form, why in result["left_out"].items():
        print(f"{form:8s} left out: {why}")
    if a.out:
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
