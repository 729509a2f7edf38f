"""Speed of the kernels for a GPU beside what torch has for the same in bf16: one JSON object, times in ms.

    python -m bench.gpu [--shape 4096x4096] [--rows 1,16,512] [--contexts 4096,32768] [--heads 32x8x128] [--rounds 30] [--out FILE]

Products with stored matrices beside torch's product of a dense one; attention of one new token over KIVI's codes, and of a prompt over half
of its blocks, beside `scaled_dot_product_attention`; the Hadamard transform beside a product with its matrix. Each takes turns with what it
is compared with, so that a slow moment is nobody's, over a cache that was written over. A kernel that is not equal to its
reference has no figures; exit code 1. Needs a GPU and `pip install laconic[gpu]`; it was never run on one: there are no figures of it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.linear import ended
from laconic.kernels.bits import packed_width
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels

GROUP = 128
# norm of the difference over the norm, of results in bf16
NEAR = 2.0**-7


class Pair(NamedTuple):
    """A kernel, what is compared with it, and what both should give."""

    label: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    right: Callable[[], Tensor]


def products(n: int, m: int, rows: int) -> Iterator[Pair]:
    """A dense matrix in bf16 beside grouped codes and fp8."""
    from laconic.kernels import linear, lookup
    from laconic.kernels.gpu import linear as kernels

    x, dense = torch.randn(rows, m).bfloat16(), torch.randn(n, m).bfloat16()

    def theirs() -> Tensor:
        return F.linear(x, dense)

    for bits in (8, 4, 3, 2):
        codes = torch.randint(0, 256, (n, packed_width(m, bits)), dtype=torch.uint8)
        scales, zeros = (
            torch.rand(n, -(-m // GROUP)).bfloat16(),
            torch.randint(0, 256, (n, packed_width(-(-m // GROUP), bits)), dtype=torch.uint8),
        )
        held, grid = (codes, scales, zeros), Grid(bits, GROUP)

        def ours(held: Any = held, bits: int = bits) -> Tensor:
            return kernels.grouped_linear(x, *held, bits, GROUP)

        def right(held: Any = held, grid: Grid = grid) -> Tensor:
            return linear.reference_linear(x, *held, grid)

        yield Pair(f"{bits} bits, {rows} rows", ours, theirs, right)
    fp8, codes, scales = Levels.fp8(), torch.randint(0, 256, (n, m), dtype=torch.uint8) & 0x77, torch.rand(n, 1).bfloat16()
    yield Pair(
        f"fp8, {rows} rows",
        lambda: kernels.lookup_linear(x, codes, scales, None, None, 8, fp8.table, 0, fp8.scales),
        theirs,
        lambda: lookup.reference_linear(x, codes, scales, None, None, fp8),
    )


def decoding(n: int, h: int, k: int, d: int) -> Iterator[Pair]:
    """One new token over n."""
    from bench.attention import RESIDUAL, cache
    from laconic.kernels.attention import attention
    from laconic.kernels.gpu.attention import held_attention

    query, dense = torch.randn(1, h, 1, d).bfloat16(), torch.randn(2, 1, k, n, d).bfloat16()
    for bits in (8, 4, 2):
        held = cache(n // RESIDUAL * RESIDUAL, k, d, bits)

        def ours(held: Any = held) -> Tensor:
            return held_attention(query, *held)

        def right(held: Any = held) -> Tensor:
            keys, values = (torch.cat([part.dense().bfloat16() for part in half], 2) for half in held)
            return attention(query, keys, values, (keys.shape[2],))

        yield Pair(
            f"attention of a token over {n}, {bits} bits",
            ours,
            lambda: F.scaled_dot_product_attention(query, *dense, enable_gqa=True),
            right,
        )


def prompts(h: int, k: int, d: int, t: int = 4096, block: int = 128) -> Iterator[Pair]:
    """A prompt over half of its blocks."""
    from laconic.kernels import blocks
    from laconic.kernels.gpu.attention import block_attention

    query, key, value = torch.randn(1, h, t, d).bfloat16(), torch.randn(1, k, t, d).bfloat16(), torch.randn(1, k, t, d).bfloat16()
    keep = (torch.rand(1, h, t // block, t // block) < 0.5) | torch.eye(t // block, dtype=torch.bool)

    def right() -> Tensor:
        # it makes its tables where the processor's numbers are
        with torch.device("cpu"):
            return blocks.block_attention(query, key, value, keep, block)

    yield Pair(
        f"attention of {t} tokens, half of the blocks",
        lambda: block_attention(query, key, value, keep, block),
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        right,
    )


def turned(n: int, rows: int) -> Iterator[Pair]:
    """The transform beside a product with its matrix."""
    from laconic.kernels import hadamard as reference
    from laconic.kernels.gpu.hadamard import hadamard

    x = torch.randn(rows, n).bfloat16()
    matrix = reference.hadamard(torch.eye(n)).bfloat16()
    yield Pair(f"Hadamard of {n}, {rows} rows", lambda: hadamard(x), lambda: x @ matrix, lambda: reference.hadamard(x.float()))


def equal(pair: Pair) -> bool:
    """Whether a kernel is as near to its reference as bf16 is."""
    found, right = pair.ours().float(), pair.right().float()
    return bool((found - right).norm() <= NEAR * right.norm())


def timed(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """ms of each call, in turns; the first turn warms up."""
    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    # larger than the second cache of any GPU
    wash = torch.empty(1 << 28, dtype=torch.uint8)
    for turn in range(rounds + 1):
        for label, call in (("ours", pair.ours), ("theirs", pair.theirs)):
            wash.zero_()
            began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            call()
            done.record()
            torch.cuda.synchronize()
            if turn:
                took[label].append(began.elapsed_time(done))
    return took


def told(times: list[float]) -> dict[str, Any]:
    """Middle, quarters and count."""
    ranked = sorted(times)
    return {"ms": statistics.median(times), "quarters_ms": [ranked[len(times) // 4], ranked[3 * len(times) // 4]], "n": len(times)}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs (default %(default)s)")
    parser.add_argument("--rows", default="1,16,512", help="rows of x (default %(default)s)")
    parser.add_argument("--contexts", default="4096,32768", help="tokens held (default %(default)s)")
    parser.add_argument("--heads", default="32x8x128", help="query heads x heads of keys x channels (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; run this where it does")
    if find_spec("triton") is None:
        sys.exit("the kernels for a GPU need triton: pip install laconic[gpu]")
    n, m = (int(part) for part in a.shape.split("x"))
    h, k, d = (int(part) for part in a.heads.split("x"))
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": [n, m],
        "heads": [h, k, d],
        "kernels": {},
    }
    wrong = []
    with torch.inference_mode(), torch.device("cuda"):
        torch.manual_seed(0)
        made = [lambda rows=int(part): products(n, m, rows) for part in a.rows.split(",")]
        made += [lambda tokens=int(part): decoding(tokens, h, k, d) for part in a.contexts.split(",")]
        made += [lambda: prompts(h, k, d), lambda: turned(m, 512)]
        for pairs in made:
            for pair in pairs():
                if not equal(pair):
                    wrong.append(pair.label)
                    continue
                took = timed(pair, a.rounds)
                found = {label: told(times) for label, times in took.items()}
                result["kernels"][pair.label] = {**found, "times_as_fast": found["theirs"]["ms"] / found["ours"]["ms"]}
    print(json.dumps(result, indent=1))
    ended(result, wrong, a.out)


if __name__ == "__main__":
    main()
