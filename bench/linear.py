"""Speed of products with compressed matrices: ratios in one run, over weights that no cache holds.

    python -m bench.linear [--shape 5632x2048] [--rows 1,8,32,128,512] [--inputs bf16|fp32] [--forms REGEX] [--threads N] [--pool GB]
        [--out FILE]

Every form has a pool of distinct matrices of at least --pool gigabytes; forms take turns, a few matrices each, so that a slow moment of the
machine is nobody's. torch's products have inputs of their own dtype, all others those of --inputs; a8: inputs are rounded to 8 bits as they
come. vectors8: an index of so many bits names 8 weights of a column, in one table or two. sparse70: 70 % of the weights are zero, anywhere;
2:4: two of each four are; the others are held in bf16, or as said. Bandwidth is that of a sum over a pool of fp32 vectors, taken in the
same turns. A form whose products are not equal to the reference's has no figures; exit code 1."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.bits import pack, packed_width
from laconic.kernels.books import book_linear, reference_book_linear
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels
from laconic.kernels.linear import grouped_linear, grouped_linear_int8, reference_linear, reference_linear_int8
from laconic.kernels.lookup import lookup_linear
from laconic.kernels.lookup import reference_linear as reference_lookup
from laconic.kernels.native import native
from laconic.kernels.sparse import Codes, Kept, reference_sparse_linear, row_starts, sparse_linear
from laconic.kernels.vectors import Vectors
from laconic.measurement import hardware

GRIDS = [
    Grid(8, 128, True), Grid(6, 64), Grid(4, 128, True), Grid(4, 64), Grid(4, 32, True),
    Grid(3, 128, True), Grid(3, 64), Grid(2, 128, True), Grid(2, 64),
]  # fmt: skip
LEVELS = {
    "mxfp4": Levels.mxfp4(), "nvfp4": Levels.nvfp4(), "fp8 g128": Levels.fp8(128),
    "codebook4 g64": Levels.codebook(4), "codebook3 g64": Levels.codebook(3),
}  # fmt: skip
# inputs as they are, and in 8 bits: the product and its reference
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "": (grouped_linear, reference_linear),
    " a8": (grouped_linear_int8, reference_linear_int8),
}
# of sparse matrices: the share that is kept, of each so many (None: of all), and the grid of what is kept (None: bf16)
SPARSE: dict[str, tuple[float, int | None, Grid | None]] = {
    "sparse70": (0.3, None, None),
    "sparse50": (0.5, None, None),
    "2:4": (0.5, 4, None),
    "2:4 int4 g64": (0.5, 4, Grid(4, 64, True)),
}
# of vectors that an index names: so many weights, bits of the index, and of that into a second table
BOOKS = {"vectors8 8 bits": Vectors(8, 8), "vectors8 12 bits": Vectors(8, 12), "vectors8 8+8 bits": Vectors(8, 8, 8)}
# error against the product in fp32, as a share of the greatest result
NEAR = 1e-3
TURN = 4
READ, BF16, FP32 = "read", "torch bf16", "torch fp32"


class Form(NamedTuple):
    """Matrices of one kind: how many bytes each has, all of them, and the product of one with x (None: no product, bytes are only read)."""

    nbytes: int
    pool: list[Any]
    product: Callable[[Tensor, Any], Tensor]


def name(grid: Grid) -> str:
    """int4 g128, with `z` where there are zero points."""
    return f"int{grid.bits} g{grid.group}{'' if grid.symmetric else 'z'}"


def codes(n: int, m: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any codes with scales of about a weight's size."""
    g = grid.count(m)
    zeros = None if grid.symmetric else torch.randint(0, 256, (n, packed_width(g, grid.bits)), dtype=torch.uint8)
    return (
        torch.randint(0, 256, (n, packed_width(m, grid.bits)), dtype=torch.uint8),
        (torch.rand(n, g) * 0.1 / 2**grid.bits).bfloat16(),
        zeros,
    )


def scattered(n: int, m: int, keep: float, run: int | None, grid: Grid | None) -> tuple[Tensor, Kept, Tensor]:
    """Mask, weights and starts of their rows; of runs the same number is kept in each, and of m no more than whole runs."""
    if run is None:
        mask = torch.rand(n, m) < keep
    else:
        among = torch.rand(n, m // run, run).argsort(-1) < round(keep * run)
        mask = F.pad(among.flatten(1), (0, m % run))
    bits, count = pack(mask.to(torch.uint8), 1), int(mask.sum())
    kept: Kept = torch.randn(count).bfloat16()
    if grid is not None:
        rows = 1 if run is None else n
        kept = Codes(*codes(rows, count // rows, grid), grid, count // rows)
    return bits, kept, row_starts(bits, m)


def held(mask: Tensor, kept: Kept) -> int:
    """Bytes of what is stored."""
    tensors = [mask, *([kept] if isinstance(kept, Tensor) else [kept.codes, kept.scales, kept.zeros])]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def leveled(n: int, m: int, levels: Levels) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Any codes of numbers, with scales and a codebook of about a weight's size."""
    stored = torch.randint(0, 256, (n, packed_width(m, levels.bits)), dtype=torch.uint8)
    if levels.bits == 8:
        # a bit that is clear leaves no code that is no number
        stored &= 0xFB
    g = levels.count(m)
    scales = (torch.rand(n, g) * 0.1).bfloat16() if levels.scales == "bf16" else torch.randint(100, 120, (n, g), dtype=torch.uint8)
    whole = torch.full((1,), 0.01) if levels.scales == "e4m3" else None
    table = torch.randn(2**levels.bits).sort().values.bfloat16() if levels.table == "codebook" else None
    return stored, scales, whole, table


def booked(n: int, m: int, vectors: Vectors) -> tuple[list[Tensor], list[Tensor]]:
    """Any indices into tables of about a weight's size."""
    stored = [torch.randint(0, 256, (vectors.runs(n), packed_width(m, bits)), dtype=torch.uint8) for bits in vectors.bits]
    return stored, [torch.randn(2**bits, vectors.width).bfloat16() * 0.1 for bits in vectors.bits]


def forms(n: int, m: int, gigabytes: float, wanted: Callable[[str], bool]) -> dict[str, Form]:
    """What is compared: reading, torch's products, and the forms that are wanted."""

    def pool(make: Callable[[], Any], nbytes: int) -> list[Any]:
        return [make() for _ in range(max(2, -(-int(gigabytes * 1e9) // nbytes)))]

    made = {READ: Form(1 << 24, pool(lambda: torch.ones(1 << 22), 1 << 24), lambda x, w: w.sum())}
    for label, dtype in ((BF16, torch.bfloat16), (FP32, torch.float32)):
        size = n * m * dtype.itemsize
        made[label] = Form(size, pool(lambda dtype=dtype: torch.randn(n, m).to(dtype), size), lambda x, w: F.linear(x.to(w.dtype), w))
    for grid in GRIDS:
        if not wanted(name(grid)):
            continue
        size = sum(t.numel() * t.element_size() for t in codes(n, m, grid) if t is not None)
        matrices = pool(lambda grid=grid: codes(n, m, grid), size)
        for number, (inputs, (product, _)) in enumerate(PRODUCTS.items()):
            # each begins elsewhere, so that none finds in a cache what the one before it read
            start = number * len(matrices) // len(PRODUCTS)
            turned = matrices[start:] + matrices[:start]
            made[name(grid) + inputs] = Form(size, turned, lambda x, w, grid=grid, product=product: product(x, *w, grid))
    for label, how in SPARSE.items():
        if not wanted(label):
            continue
        first = scattered(n, m, *how)
        copies = pool(lambda first=first: tuple(_copy(part) for part in first), held(*first[:2]))
        made[label] = Form(held(*first[:2]), copies, lambda x, w: sparse_linear(x, *w))
    for label, levels in LEVELS.items():
        if not wanted(label):
            continue
        size = sum(t.numel() * t.element_size() for t in leveled(n, m, levels) if t is not None)
        matrices = pool(lambda levels=levels: leveled(n, m, levels), size)
        made[label] = Form(size, matrices, lambda x, w, levels=levels: lookup_linear(x, *w, levels))
    for label, vectors in BOOKS.items():
        if not wanted(label):
            continue
        size = sum(t.numel() * t.element_size() for part in booked(n, m, vectors) for t in part)
        matrices = pool(lambda vectors=vectors: booked(n, m, vectors), size)
        made[label] = Form(size, matrices, lambda x, w, vectors=vectors: book_linear(x, *w, None, vectors, n))
    return made


def _copy(part: Kept) -> Kept:
    """The same numbers elsewhere in memory."""
    if isinstance(part, Tensor):
        return part.clone()
    return part._replace(codes=part.codes.clone(), scales=part.scales.clone(), zeros=None if part.zeros is None else part.zeros.clone())


def equal(m: int, rows: int) -> list[str]:
    """Forms whose products are wrong, over a few outputs, with inputs in fp32 and in bf16, which have ways of their own."""
    x, bad = torch.randn(rows, m), []

    def check(label: str, product: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> None:
        for given, near in ((x, NEAR), (x.bfloat16(), 2.0**-7)):
            right = reference(given).float()
            if not float((product(given).float() - right).abs().max() / right.abs().max()) <= near:
                bad.append(label)

    for grid in GRIDS:
        w = codes(37, m, grid)
        for inputs, (product, reference) in PRODUCTS.items():
            check(name(grid) + inputs, lambda x, p=product, w=w, g=grid: p(x, *w, g), lambda x, p=reference, w=w, g=grid: p(x, *w, g))
    for label, how in SPARSE.items():
        mask, kept, starts = scattered(37, m, *how)
        check(
            label,
            lambda x, mask=mask, kept=kept, starts=starts: sparse_linear(x, mask, kept, starts),
            lambda x, mask=mask, kept=kept: reference_sparse_linear(x, mask, kept),
        )
    for label, levels in LEVELS.items():
        w = leveled(37, m, levels)
        check(label, lambda x, w=w, k=levels: lookup_linear(x, *w, k), lambda x, w=w, k=levels: reference_lookup(x, *w, k))
    for label, vectors in BOOKS.items():
        w = booked(37, m, vectors)
        check(
            label,
            lambda x, w=w, v=vectors: book_linear(x, *w, None, v, 37),
            lambda x, w=w, v=vectors: reference_book_linear(x, *w, None, v, 37),
        )
    return bad


def timed(made: dict[str, Form], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a product, by form."""
    took: dict[str, list[float]] = {label: [] for label in made}
    at = dict.fromkeys(made, 0)
    for turn in range(rounds + 1):
        for label, form in made.items():
            for _ in range(TURN):
                w = form.pool[at[label] % len(form.pool)]
                at[label] += 1
                began = time.perf_counter()
                form.product(x, w)
                if turn:
                    took[label].append(time.perf_counter() - began)
    return {label: statistics.median(times) for label, times in took.items()}


def ended(result: dict[str, Any], wrong: list[str], out: Path | None) -> NoReturn:
    """Names what has no figures, writes the rest to a file where one was asked for, and ends with the exit code."""
    for label in wrong:
        print(f"{label}: NOT EQUAL to the reference")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


def main() -> None:
    """Prints a table for each number of rows, and one JSON object with all of it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="5632x2048", help="outputs x inputs (default %(default)s)")
    parser.add_argument("--rows", default="1,8,32,128,512", help="rows of x (default %(default)s)")
    parser.add_argument("--inputs", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pool", type=float, default=1.0, help="gigabytes of each form (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--forms", default="", help="how names of forms begin, a regular expression (all, which takes memory)")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    n, m = (int(part) for part in a.shape.split("x"))
    there = native()
    result: dict[str, Any] = {
        "shape": [n, m], "inputs": a.inputs, "threads": a.threads, "pool_gb": a.pool, "kernels": there.level if there else "reference",
        "processor": hardware()["processor"], "torch": torch.__version__, "rows": {},
    }  # fmt: skip
    wrong = sorted({label for rows in (1, 5, 300) for label in equal(m, rows)})
    with torch.inference_mode():
        found = forms(n, m, a.pool, lambda label: re.match(a.forms, label) is not None)
        made = {label: form for label, form in found.items() if label not in wrong}
        for rows in (int(r) for r in a.rows.split(",")):
            # fewer turns where a product takes long
            x = torch.randn(rows, m).to(torch.bfloat16 if a.inputs == "bf16" else torch.float32)
            took = timed(made, x, max(3, a.rounds // max(1, rows // 32)))
            bandwidth = made[READ].nbytes / took[READ]
            print(f"\n{n} x {m}, {rows} rows of {a.inputs}, {a.threads} threads, {result['kernels']}; read {bandwidth / 1e9:.1f} GB/s")
            table = result["rows"][rows] = {}
            for label, form in made.items():
                if label == READ:
                    continue
                t = took[label]
                table[label] = {
                    "ms": t * 1e3, "against_bf16": took[BF16] / t, "against_fp32": took[FP32] / t,
                    "share_of_bandwidth": form.nbytes / t / bandwidth, "gflops": 2 * n * m * rows / t / 1e9,
                }  # fmt: skip
                print(
                    f"{label:18s} {t * 1e3:8.3f} ms  {took[BF16] / t:5.2f}x bf16  {took[FP32] / t:5.2f}x fp32  "
                    f"{form.nbytes / t / bandwidth:4.0%} of bandwidth  {2 * n * m * rows / t / 1e9:6.0f} GFLOP/s",
                    flush=True,
                )
    ended(result, wrong, a.out)


if __name__ == "__main__":
    main()
