"""Speed of attention over caches as they are held: ratios in one run, over caches that no processor cache holds.

    python -m bench.attention [--contexts 1024,8192,32768,65536] [--heads 32x8x128] [--threads N] [--pool GB] [--out FILE]

One new token over keys and values in bf16 and in KIVI's layout (groups of 32, the newest 128 values as they are) with 8, 4 and 2 bits, and
torch's own `scaled_dot_product_attention` in bf16. Every form has a pool of distinct caches of at least --pool gigabytes; forms take turns,
so that a slow moment of the machine is nobody's. Bandwidth is that of a sum over a pool of fp32 vectors, taken in the same turns. A form
that is not equal to the reference has no figures; exit code 1."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.linear import ended
from laconic.core.state import PAGE
from laconic.kernels.attention import Grouped, Part, Plain, attention, held_attention
from laconic.kernels.bits import packed_width
from laconic.kernels.native import native
from laconic.measurement import hardware

BITS, GROUP, RESIDUAL = (8, 4, 2), 32, 128
# norm of the difference over the norm, of results in bf16
NEAR = 4e-3
READ, SDPA, HELD = "read", "torch sdpa bf16", "bf16"

Half = tuple[list[Part], list[Part]]


class Form(NamedTuple):
    """Caches of one kind: how many bytes each has, all of them, and attention over one."""

    nbytes: int
    pool: list[Any]
    attend: Callable[[Tensor, Any], Tensor]


def paged(n: int, k: int, *rest: int, make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """n entries of k heads in a cache's pages."""
    return tuple(make(1, k, min(PAGE, n - at), *rest) for at in range(0, n, PAGE))


def numbers(n: int, k: int, d: int) -> Plain:
    """Tokens in bf16."""
    return Plain(paged(n, k, d, make=lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)), (n,))


def codes(n: int, k: int, d: int, bits: int, along: bool) -> Grouped:
    """n tokens in codes, with scales of about a number's size."""
    entries, r, m = (n // GROUP, d, GROUP) if along else (n, 1, d)

    def small(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.bfloat16) * (2 / 2**bits)

    stored = paged(entries, k, r, packed_width(m, bits), make=lambda *shape: torch.randint(0, 256, shape, dtype=torch.uint8))
    scales, zeros = (paged(entries, k, r, m // GROUP, make=small) for _ in range(2))
    return Grouped(stored, scales, zeros, (entries,), bits, GROUP, along, d)


def cache(n: int, k: int, d: int, bits: int) -> Half:
    """Keys and values of n tokens, a multiple of the residual, as KIVI holds them."""
    return [codes(n, k, d, bits, True)], [codes(n - RESIDUAL, k, d, bits, False), numbers(RESIDUAL, k, d)]


def nbytes(held: Half) -> int:
    """Bytes of a cache."""
    parts = [part for half in held for part in half]
    pages = [
        page
        for part in parts
        for found in ([part.pages] if isinstance(part, Plain) else [part.codes, part.scales, part.zeros])
        for page in found
    ]
    return sum(page.numel() * page.element_size() for page in pages)


def forms(n: int, k: int, d: int, gigabytes: float) -> dict[str, Form]:
    """All that is compared."""

    def pool(make: Callable[[], Any], size: int) -> list[Any]:
        return [make() for _ in range(max(2, -(-int(gigabytes * 1e9) // size)))]

    def held(make: Callable[[], Half]) -> Form:
        size = nbytes(make())
        return Form(size, pool(make, size), lambda query, one: held_attention(query, *one))

    def dense() -> tuple[Tensor, Tensor]:
        return torch.randn(1, k, n, d, dtype=torch.bfloat16), torch.randn(1, k, n, d, dtype=torch.bfloat16)

    size = 2 * k * n * d * 2
    return {
        READ: Form(1 << 26, pool(lambda: torch.ones(1 << 24), 1 << 26), lambda query, one: one.sum()),
        SDPA: Form(size, pool(dense, size), lambda query, one: F.scaled_dot_product_attention(query, *one, enable_gqa=True)),
        HELD: held(lambda: ([numbers(n, k, d)], [numbers(n, k, d)])),
        **{f"{bits} bits": held(lambda bits=bits: cache(n, k, d, bits)) for bits in BITS},  # type: ignore[misc]
    }


def equal(h: int, k: int, d: int) -> list[str]:
    """Forms whose attention is wrong, over a few tiles."""
    bad, n = [], 5 * RESIDUAL
    made = {HELD: ([numbers(n, k, d)], [numbers(n, k, d)]), **{f"{bits} bits": cache(n, k, d, bits) for bits in BITS}}
    query = torch.randn(1, h, 1, d, dtype=torch.bfloat16)
    for label, (keys, values) in made.items():
        dense = [torch.cat([part.dense().double() for part in half], 2) for half in (keys, values)]
        right = attention(query.double(), *dense, (n,))
        if float((held_attention(query, keys, values) - right).norm() / right.norm()) > NEAR:
            bad.append(label)
    return bad


def timed(made: dict[str, Form], query: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by form; the first turn warms up."""
    took: dict[str, list[float]] = {label: [] for label in made}
    for turn in range(rounds + 1):
        for label, form in made.items():
            one = form.pool[turn % len(form.pool)]
            began = time.perf_counter()
            form.attend(query, one)
            if turn:
                took[label].append(time.perf_counter() - began)
    return took


def main() -> None:
    """Prints a table for each context, and one JSON object with all of it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="1024,8192,32768,65536", help="tokens held (default %(default)s)")
    parser.add_argument("--heads", default="32x8x128", help="query heads x heads of keys x channels (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pool", type=float, default=1.0, help="gigabytes of each form (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    h, k, d = (int(part) for part in a.heads.split("x"))
    there = native()
    result: dict[str, Any] = {
        "heads": [h, k, d], "threads": a.threads, "pool_gb": a.pool, "kernels": there.level if there else "reference",
        "processor": hardware()["processor"], "torch": torch.__version__, "contexts": {},
    }  # fmt: skip
    wrong = equal(h, k, d)
    with torch.inference_mode():
        for n in (int(part) // RESIDUAL * RESIDUAL for part in a.contexts.split(",")):
            made = {label: form for label, form in forms(n, k, d, a.pool).items() if label not in wrong}
            took = timed(made, torch.randn(1, h, 1, d, dtype=torch.bfloat16), a.rounds)
            middle = {label: statistics.median(times) for label, times in took.items()}
            bandwidth = made[READ].nbytes / middle[READ]
            print(
                f"\n{n} tokens, {h} query heads over {k} of {d}, {a.threads} threads, {result['kernels']}; read {bandwidth / 1e9:.1f} GB/s"
            )
            table = result["contexts"][n] = {}
            for label, form in made.items():
                if label == READ:
                    continue
                t = middle[label]
                times = sorted(took[label])
                table[label] = {
                    "ms": t * 1e3, "quarters_ms": [times[len(times) // 4] * 1e3, times[3 * len(times) // 4] * 1e3], "n": len(times),
                    "megabytes": form.nbytes / 1e6, "share_of_bandwidth": form.nbytes / t / bandwidth,
                    "against_held_bf16": middle[HELD] / t if HELD in middle else None, "against_sdpa": middle[SDPA] / t,
                }  # fmt: skip
                print(
                    f"{label:16s} {t * 1e3:8.3f} ms  {form.nbytes / 1e6:7.1f} MB  {form.nbytes / t / bandwidth:4.0%} of bandwidth  "
                    + (f"{middle[HELD] / t:5.2f}x bf16  " if HELD in middle else "")
                    + f"{middle[SDPA] / t:5.2f}x sdpa",
                    flush=True,
                )
            del made
    ended(result, wrong, a.out)


if __name__ == "__main__":
    main()
