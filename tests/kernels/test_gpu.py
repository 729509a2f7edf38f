"""The kernels for GPUs are equal to their references: on a GPU where there is one, else in Triton's interpreter on the processor.

Bounds are those of the arithmetic, entry by entry, against the exact product in fp64: a sum of m numbers in fp32 errs by at most
m 2^-24 of the sum of their sizes, and what is rounded to bf16 or fp16 by 2^-8 or 2^-11 of itself (half the distance of two numbers; 2^-25
at least in fp16). `SPARE` is for the few operations besides."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

if find_spec("triton") is None:
    pytest.skip("the kernels for GPUs need triton: pip install laconic[gpu]", allow_module_level=True)

from laconic.kernels import attention as decoding
from laconic.kernels import blocks, gpu, linear, lookup
from laconic.kernels import hadamard as turning
from laconic.kernels.attention import Grouped, Part, Plain
from laconic.kernels.bits import pack, packed_width
from laconic.kernels.gpu import attention, hadamard, trials
from laconic.kernels.gpu import linear as kernels
from laconic.kernels.grids import Grid
from laconic.kernels.levels import FLOATS, Levels, values
from laconic.methods.cache.store.bfp import Bfp
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi, quantize
from laconic.runtime import StateCache

# the interpreter computes with NumPy, which says where something is no number
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of what is rounded, in its own size
ROUND = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
LEAST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
SPARE = 8
# rows, outputs, inputs, group: one of each, a shorter last group, groups that no run fits, several tiles
SHAPES = ((1, 1, 1, None), (1, 9, 67, 32), (2, 3, 33, None), (17, 5, 24, 5), (70, 70, 40, 16), (1, 20, 1100, 128), (3, 66, 300, 128))
KINDS = [
    (bits, symmetric, half) for bits in range(1, 9) for symmetric in (False, True) for half in (False, True) if not (bits == 8 and half)
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(n: int, m: int, grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, scales and zeros of a grid."""
    g, groups = seeded(seed), grid.count(m)
    codes = pack(torch.randint(0, 2**grid.bits, (n, m), generator=g), grid.bits)
    scales = torch.randn(n, groups, generator=g).bfloat16()
    top = (2**grid.bits - 1) * grid.zero_steps
    zeros = None if grid.symmetric else pack(torch.randint(0, top + 1, (n, groups), generator=g), grid.zero_bits)
    return codes.to(HERE), scales.to(HERE), None if zeros is None else zeros.to(HERE)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(dtype).to(HERE)


def words(grid: Grid) -> tuple[int, int]:
    return grid.bits, grid.group or 0


def within(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    assert found.shape == exact.shape
    room = bound + ROUND[found.dtype] * exact.abs() + LEAST[found.dtype]
    over = (found.double() - exact).abs() - room
    assert bool((over <= 0).all()), f"{float(over.max()):.3g} over a bound of {float(room[over == over.max()].min()):.3g}"


def multiplied(found: Tensor, x: Tensor, dense: Tensor) -> None:
    """found is x times the transpose of dense (n, m) fp32, by the bounds; dense rounded to x's dtype where x has several rows."""
    rows = x.reshape(-1, x.shape[-1])
    weight = (dense if rows.shape[0] == 1 else dense.to(x.dtype)).double()
    exact, sizes = rows.double() @ weight.T, rows.double().abs() @ weight.abs().T
    within(found.reshape(exact.shape), exact, sizes * (x.shape[-1] + SPARE) * 2.0**-24)


@pytest.mark.parametrize(("bits", "symmetric", "half"), KINDS)
def test_grouped_codes_of_every_kind(bits: int, symmetric: bool, half: bool) -> None:
    at = KINDS.index((bits, symmetric, half))
    for group, m in ((16, 37), (None, 19)):
        grid = Grid(bits, group, symmetric, zeros="half" if half else "whole")
        held = matrix(6, m, grid, at)
        dense = linear.reference_dense(*held, grid, m)
        assert torch.equal(kernels.grouped_dense(*held, *words(grid), m, half), dense)
        for rows in (1, 3):
            x = inputs(rows, m, dtype=DTYPES[(at + rows) % 3])
            multiplied(kernels.grouped_linear(x, *held, *words(grid), half), x, dense)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_every_size(bits: int, shape: tuple[int, int, int, int | None]) -> None:
    rows, n, m, group = shape
    grid = Grid(bits, group)
    held = matrix(n, m, grid)
    dense = linear.reference_dense(*held, grid, m)
    assert torch.equal(kernels.grouped_dense(*held, *words(grid), m), dense)
    for dtype in DTYPES if rows < 70 else DTYPES[:2]:
        x = inputs(rows, m, dtype=dtype)
        found = kernels.grouped_linear(x, *held, *words(grid))
        assert found.dtype == dtype
        multiplied(found, x, dense)


def test_what_does_not_lie_in_one_piece() -> None:
    grid = Grid(4, 16)
    codes, scales, zeros = matrix(10, 48, grid)
    assert zeros is not None
    # every second row, and inputs that lie by columns
    held = codes[::2], scales[::2], zeros[::2]
    dense = linear.reference_dense(*(t.contiguous() for t in held), grid, 48)
    apart = codes.T.contiguous().T[::2], scales.T.contiguous().T[::2], zeros.T.contiguous().T[::2]
    for some, rows in product((held, apart), (1, 5)):
        x = inputs(48, rows).T
        assert torch.equal(kernels.grouped_dense(*some, *words(grid), 48), dense)
        multiplied(kernels.grouped_linear(x, *some, *words(grid)), x, dense)
    x = inputs(2, 3, 96)[..., ::2]
    found = kernels.grouped_linear(x, *held, *words(grid))
    assert found.shape == (2, 3, 5)
    multiplied(found, x, dense)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(dtype: torch.dtype, rows: int) -> None:
    grid = Grid(4, 16)
    codes, scales, zeros = matrix(6, 40, grid)
    # zero, the least and the greatest that fp16 still holds times a code, tiny
    scales[0], scales[1], scales[2, 0], scales[3] = 0.0, 2.0**-14, 0.0, 2.0**-60
    scales[4] = 2.0**100 if dtype != torch.float16 else 2.0**9
    x = inputs(rows, 40, dtype=dtype) * (2.0**-3)
    dense = linear.reference_dense(codes, scales, zeros, grid, 40)
    found = kernels.grouped_linear(x, codes, scales, zeros, *words(grid))
    assert bool(found.isfinite().all())
    multiplied(found, x, dense)
    assert torch.equal(kernels.grouped_dense(codes, scales, zeros, *words(grid), 40), dense)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_no_numbers(dtype: torch.dtype, rows: int) -> None:
    grid = Grid(4, 16)
    held = matrix(6, 40, grid)
    for odd in (torch.nan, torch.inf, -torch.inf):
        x = inputs(rows, 40, dtype=dtype)
        x[-1, 17] = odd
        wanted, found = linear.reference_linear(x, *held, grid), kernels.grouped_linear(x, *held, *words(grid))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found[-1].nan_to_num(0.0), wanted[-1].nan_to_num(0.0))
        if rows > 1:
            multiplied(found[:-1], x[:-1], linear.reference_dense(*held, grid, 40))


def test_scales_that_are_no_numbers_stay_in_their_row() -> None:
    grid = Grid(4, 16, symmetric=True)
    codes, scales, zeros = matrix(6, 41, grid)
    # of the last group, which is shorter
    scales[2, 2], scales[3, 2] = torch.nan, torch.inf
    for rows in (1, 3):
        x = inputs(rows, 41)
        wanted, found = (
            linear.reference_linear(x, codes, scales, zeros, grid),
            kernels.grouped_linear(x, codes, scales, zeros, *words(grid)),
        )
        assert torch.equal(found.isfinite(), wanted.isfinite())
        assert bool(found[:, [0, 1, 4, 5]].isfinite().all())


def test_what_kernels_leave_to_the_reference() -> None:
    grid = Grid(4, 16)
    held = matrix(5, 24, grid)
    for x in (inputs(2, 24, dtype=torch.float64), inputs(0, 24), inputs(3, 0, 24)):
        found = kernels.grouped_linear(x, *held, *words(grid))
        assert torch.equal(found, linear.reference_linear(x, *held, grid))
    with pytest.raises(ValueError, match="codes have shape"):
        kernels.grouped_linear(inputs(2, 25), *held, *words(grid))
    with pytest.raises(TypeError, match="scales are"):
        kernels.grouped_dense(held[0], held[1].float(), held[2], *words(grid), 24)


def looked(n: int, m: int, levels: Levels, odd: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Random codes and scales of a table; odd: codes of NaN too."""
    g = seeded(levels.bits)
    codes = torch.randint(0, 2**levels.bits, (n, m), generator=g)
    if levels.table in FLOATS and not odd:
        codes = torch.where(values(levels.table)[codes].isnan(), 0, codes)
    kinds = {"bf16": torch.randn(n, levels.count(m), generator=g).bfloat16()}
    kinds["e8m0"] = torch.randint(110, 140, (n, levels.count(m)), generator=g).to(torch.uint8)
    kinds["e4m3"] = torch.randint(0, 127, (n, levels.count(m)), generator=g).to(torch.uint8)
    table = torch.randn(2**levels.bits, generator=g).sort().values.bfloat16() if levels.table == "codebook" else None
    whole = torch.tensor([0.37]) if levels.scales == "e4m3" else None
    held = pack(codes, levels.bits), kinds[levels.scales], whole, table
    return tuple(None if t is None else t.to(HERE) for t in held)  # type: ignore[return-value]


TABLES = [Levels(1 + sum(FLOATS[name][:2]), name, 16, "bf16") for name in FLOATS]  # type: ignore[arg-type]
TABLES += [Levels.codebook(bits, 16) for bits in range(1, 9)]
TABLES += [Levels.fp8(), Levels.mxfp4(), Levels.nvfp4(), Levels(6, "e2m3", 7, "e8m0"), Levels(3, "codebook", None, "e4m3")]


@pytest.mark.parametrize("levels", TABLES, ids=str)
def test_named_values_of_every_kind(levels: Levels) -> None:
    m, told = 37, (levels.bits, levels.table, levels.group or 0, levels.scales)
    odd = looked(5, m, levels, odd=True)
    same = kernels.lookup_dense(*odd, *told, m), lookup.reference_dense(*odd, levels, m)
    assert torch.equal(same[0].isnan(), same[1].isnan())
    assert torch.equal(same[0].nan_to_num(), same[1].nan_to_num())
    held = looked(5, m, levels)
    dense = lookup.reference_dense(*held, levels, m)
    for rows, dtype in ((1, torch.bfloat16), (3, DTYPES[levels.bits % 2])):
        x = inputs(rows, m, dtype=dtype)
        multiplied(kernels.lookup_linear(x, *held, *told), x, dense)


def test_the_tables_of_floats_are_the_formats_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None].to(HERE)
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=HERE)
    for table, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        found, wanted = kernels.lookup_dense(codes, one, None, None, 8, table, 0, "bf16", 256), codes.view(dtype).float()
        assert torch.equal(found[wanted.isfinite()], wanted[wanted.isfinite()])
        # what is not finite is no number here
        assert bool(found[~wanted.isfinite()].isnan().all())


def test_scales_that_are_the_least_power() -> None:
    codes, scales = torch.tensor([[0x21, 0x43]], dtype=torch.uint8).to(HERE), torch.tensor([[0, 254]], dtype=torch.uint8).to(HERE)
    levels = Levels(4, "e2m1", 2, "e8m0")
    wanted = lookup.reference_dense(codes, scales, None, None, levels, 4)
    assert torch.equal(kernels.lookup_dense(codes, scales, None, None, 4, "e2m1", 2, "e8m0", 4), wanted)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 24, 28, 56, 60, 64, 256, 1024])
def test_hadamard(n: int) -> None:
    for shape, dtype in (((n,), torch.float32), ((3, n), torch.bfloat16), ((2, 17, n), torch.float16)):
        x = inputs(*shape, dtype=dtype, seed=n)
        for ours, theirs in ((hadamard.hadamard, turning.hadamard), (hadamard.unhadamard, turning.unhadamard)):
            found, exact = ours(x), theirs(x.double())
            assert found.dtype == dtype
            # log2 n sums and the small factor's, none of them greater than the sum of all sizes over the root of n, twice for Hartley's
            sizes = x.double().abs().sum(-1, keepdim=True) * 2 / n**0.5
            within(found, exact, (sizes * (n.bit_length() + n // (n & -n) + SPARE) * 2.0**-24).expand_as(exact))
    apart = inputs(n, 5).T
    assert torch.allclose(hadamard.unhadamard(hadamard.hadamard(apart)), apart, atol=1e-5)
    wide = inputs(n, dtype=torch.float64)
    assert torch.equal(hadamard.hadamard(wide), turning.hadamard(wide))


def paged(x: Tensor, page: int) -> tuple[Tensor, ...]:
    return tuple(some.contiguous() for some in x.split(page, 2))


def coded(x: Tensor, bits: int, group: int, along: bool, page: int, lengths: tuple[int, ...]) -> Grouped:
    """Tokens (b, k, n, d) in codes, all of them in groups of tokens or each of channels."""
    b, k, n, d = x.shape
    unit = group if along else 1
    rows = x.reshape(b, k, n // unit, unit, d)
    codes, scale, zero = quantize(rows.transpose(-1, -2) if along else rows, bits, group)
    stored = pack(codes.reshape(-1, codes.shape[-1]), bits).reshape(*codes.shape[:-1], -1)
    assert stored.shape[-1] == packed_width(codes.shape[-1], bits)
    return Grouped(*(paged(t, page) for t in (stored, scale, zero)), tuple(m // unit for m in lengths), bits, group, along, d)


def cache(bits: int, along: bool, dtype: torch.dtype, lengths: tuple[int, ...], recent: tuple[int, ...], d: int, seed: int) -> list[Part]:
    """Two heads: tokens in codes, then tokens as they are in two parts."""
    b = len(lengths)
    x = inputs(b, 2, max(max(lengths), 1), d, dtype=dtype, seed=seed)
    rest = inputs(b, 2, max(recent), d, dtype=dtype, seed=seed + 1)
    new = Plain((inputs(b, 2, 2, d, dtype=dtype, seed=seed + 2),), (2,) * b)
    held: list[Part] = [coded(x, bits, 8, along, 3 if along else 20, lengths)] if max(lengths) else []
    return [*held, Plain(paged(rest, 7), recent), new]


def attended(found: Tensor, query: Tensor, keys: list[Part], values: list[Part], mask: Tensor | None, scale: float | None) -> None:
    key, value = (decoding._dense(half, query.dtype).double() for half in (keys, values))
    lengths = decoding._checked(query, keys, values, mask)
    exact = decoding.attention(query.double(), key, value, lengths, mask, scale)
    # scores are sums over d, weights their exp (2^-21), outputs sums over tokens, of values of at most `most`
    by, served = query.shape[-1] ** -0.5 if scale is None else scale, query.shape[1] // key.shape[1]
    scores = (query.double().abs() @ key.abs().repeat_interleave(served, 1).transpose(-1, -2)).amax(-1, keepdim=True) * by
    off = scores * (query.shape[-1] + SPARE) * 2.0**-24
    # 16 bits: weights as two numbers
    halves = 0.0 if query.dtype == torch.float32 else 2.0**-16
    most = value.abs().amax()
    within(found, exact, (most * (2 * off + 2 * (key.shape[2] + SPARE) * 2.0**-24 + 2.0**-20 + halves)).expand_as(exact))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("along", [(True, False), (False, True)])
def test_attention_over_codes(bits: int, along: tuple[bool, bool]) -> None:
    # values leave the recent tokens earlier than keys; rows are of unlike length
    for at, dtype in enumerate(DTYPES if bits in (3, 4) else DTYPES[1:2]):
        d = (20, 16, 24)[at]
        keys = cache(bits, along[0], dtype, (56, 24), (9, 12), d, 3)
        values = cache(bits, along[1], dtype, (64, 32), (1, 4), 13, 7)
        for t, splits in ((1, 3), (2, 1)):
            query = inputs(2, 6, t, d, dtype=dtype)
            found = attention.held_attention(query, keys, values, None, 0.3 if t == 1 else None, splits)
            assert found.dtype == dtype
            attended(found, query, keys, values, None, 0.3 if t == 1 else None)


def test_attention_where_one_half_has_no_codes_yet_and_under_a_mask() -> None:
    keys = cache(2, True, torch.bfloat16, (0, 0), (11, 3), 16, 3)
    values = cache(2, False, torch.bfloat16, (10, 2), (1, 1), 16, 5)
    query = inputs(2, 4, 3, 16, dtype=torch.bfloat16)
    mask = torch.rand(2, 3, 13, generator=seeded()).to(HERE) > 0.4
    mask[1, 0] = False
    for looks, splits in product((None, mask), (1, 2)):
        found = attention.held_attention(query, keys, values, looks, None, splits)
        attended(found, query, keys, values, looks, None)
        assert looks is None or not bool(found[1, :, 0].any())


def test_attention_of_scores_that_are_large_or_no_numbers() -> None:
    keys, values = (cache(4, along, torch.float32, (24,), (5,), 16, 3) for along in (True, False))
    query = inputs(1, 2, 1, 16) * 300
    attended(attention.held_attention(query, keys, values, splits=1), query, keys, values, None, None)
    for odd in (torch.nan, torch.inf):
        query[0, 1, 0, 3] = odd
        found = attention.held_attention(query, keys, values)
        wanted = decoding.attention(query, *(decoding._dense(half, query.dtype) for half in (keys, values)), (31,))
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not bool(found[0, 1].any())


def test_attention_that_kernels_leave_to_the_reference() -> None:
    plain: list[Part] = [Plain((inputs(1, 2, 9, 16),), (9,))]
    query = inputs(1, 4, 1, 16)
    assert torch.equal(attention.held_attention(query, plain, plain), decoding.held_attention(query, plain, plain))
    keys, values = (cache(4, along, torch.float32, (24,), (5,), 16, 3) for along in (True, False))
    many = inputs(1, 4, 17, 16)
    assert torch.equal(attention.held_attention(many, keys, values), decoding.held_attention(many, keys, values))
    with pytest.raises(ValueError, match="the first has to be a multiple"):
        attention.held_attention(inputs(1, 3, 1, 16), keys, values)


@pytest.mark.parametrize("block", [5, 16, 20, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_blocks(block: int, dtype: torch.dtype) -> None:
    (t, s), k = (37, 45), 1
    query, key, value = inputs(1, 2, t, 12, dtype=dtype), inputs(1, k, s, 12, dtype=dtype, seed=2), inputs(1, k, s, 7, dtype=dtype, seed=3)
    keep = torch.rand(1, 2, -(-t // block), -(-s // block), generator=seeded(block)).to(HERE) > 0.5
    # a row of blocks that keeps nothing
    keep[0, 0, 0] = False
    found = attention.block_attention(query, key, value, keep, block)
    assert found.dtype == dtype
    own = torch.arange(t, device=HERE)[:, None] + s - t
    tokens = torch.arange(s, device=HERE)
    seen = keep.repeat_interleave(block, 2)[:, :, :t].repeat_interleave(block, 3)[..., :s] & (tokens <= own)
    scores = query.double() @ key.double().transpose(-1, -2) * 12**-0.5
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ value.double()
    assert not bool(found[0, 0, : min(block, t)].any())
    off = (query.double().abs() @ key.double().abs().transpose(-1, -2)).amax(-1, keepdim=True) * 12**-0.5 * (12 + SPARE) * 2.0**-24
    # weights are rounded to the dtype, their sum is not
    wide = value.double().abs().amax() * (2 * off + 2 * (s + SPARE) * 2.0**-24 + 2.0**-20 + 2 * ROUND[dtype])
    within(found, exact, wide.expand_as(exact))
    theirs = blocks.block_attention(query, key, value, keep, block)
    within(theirs, exact, 2 * wide.expand_as(exact))


def test_blocks_of_a_query_that_is_no_number() -> None:
    query, key, value = inputs(1, 1, 20, 8), inputs(1, 1, 20, 8, seed=2), inputs(1, 1, 20, 8, seed=3)
    query[0, 0, 13, 2] = torch.nan
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=HERE)
    found = attention.block_attention(query, key, value, keep, 8)
    assert found[0, 0, :, 0].isnan().nonzero().flatten().tolist() == [13]
    with pytest.raises(ValueError, match="does not fit"):
        attention.block_attention(query, key, value, keep[..., :2], 8)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Caches are read by the kernel, here too; how many new tokens each call had."""
    asked: list[int] = []
    ours = attention.held_attention

    def counted(query: Tensor, *args: Any) -> Tensor:
        asked.append(query.shape[2])
        return ours(query, *args)

    monkeypatch.setattr(gpu, "trusted", lambda name: name == "held_attention")
    monkeypatch.setattr(attention, "held_attention", counted)
    monkeypatch.setitem(decoding.ELSEWHERE, HERE, gpu.held_attention)
    return asked


@pytest.mark.parametrize("make", [lambda: Kivi(2, 8, 8), lambda: Bfp(), lambda: Full()], ids=["kivi", "bfp", "full"])
def test_caches_attend_by_the_kernel(make: Any, called: list[int]) -> None:
    state, g = make(), seeded()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    for t in (40, 1, 1):
        new = tuple(torch.randn(2, 2, t, 16, generator=g).bfloat16().to(HERE) for _ in range(2))
        state.append(0, new, None, mask.to(HERE) if t == 40 else None)
        state.commit(torch.tensor(state.waiting(0)))
    query = torch.randn(2, 4, 1, 16, generator=g).bfloat16().to(HERE)
    found, (keys, values) = state.attend(query, 0, None), state.seen(0)
    right = decoding.attention(query, keys.data, values.data, keys.lengths)
    assert called == [1]
    # weights are rounded here as values are there
    assert float((found - right).float().norm() / right.float().norm()) < 2.0**-7


def test_a_model_writes_by_the_kernel_over_its_cache(called: list[int]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=None)
    model = LlamaForCausalLM(config).eval().to(HERE)
    ids = torch.randint(0, 64, (1, 30), generator=seeded()).to(HERE)
    logits = []
    for direct in (True, False):
        if not direct:
            decoding.ELSEWHERE.clear()
        cache = StateCache(model, Kivi(4, 8, 8))
        with torch.inference_mode():
            steps = [model(some, past_key_values=cache).logits[:, -1] for some in (ids[:, :26], *ids[:, 26:].split(1, 1))]
        logits.append(torch.stack(steps))
    # four tokens in two layers; the prompt was read as it came
    assert called == [1] * 4 * 2
    assert torch.allclose(*logits, atol=1e-4)


def test_a_cache_that_no_kernel_is_trusted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = (cache(4, along, torch.float32, (24,), (5,), 16, 3) for along in (True, False))
    query = inputs(1, 4, 1, 16)
    wanted = decoding.held_attention(query, keys, values)
    monkeypatch.setattr(gpu, "trusted", lambda name: False)
    monkeypatch.setitem(decoding.ELSEWHERE, HERE, gpu.held_attention)
    assert torch.equal(decoding.held_attention(query, keys, values), wanted)


@pytest.mark.parametrize("name", [*gpu.OPERATORS, "block_attention", "held_attention"])
def test_trials_pass(name: str) -> None:
    assert getattr(trials, name)(torch.device(HERE)) is None


def test_a_wrong_kernel_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "possible", lambda: True)
    for wrong, said in ((lambda _: "it is far off", "far off"), (lambda _: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(trials, "grouped_linear", wrong)
        gpu.trusted.cache_clear()
        with pytest.warns(UserWarning, match=said):
            assert not gpu.trusted("grouped_linear")
    gpu.trusted.cache_clear()


@pytest.mark.skipif(HERE == "cuda", reason="without a GPU only")
def test_nothing_is_put_in_place_without_a_gpu() -> None:
    assert not gpu.load()
    assert not gpu.trusted("grouped_linear")
    assert not gpu._REGISTERED
    assert not decoding.ELSEWHERE


def test_the_bench_has_equal_kernels_and_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import gpu as bench

    with torch.inference_mode(), torch.device(HERE):
        for made in (bench.products(48, 300, 3), bench.decoding(256, 4, 2, 32), bench.prompts(2, 1, 32, 96, 16), bench.turned(96, 3)):
            for pair in made:
                assert pair.theirs().shape == pair.ours().shape
                assert bench.equal(pair), pair.label
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        bench.main()


IN_PLACE = """
import sys, torch
from laconic.kernels import gpu, hadamard, linear
from laconic.kernels.grids import Grid

asked = []
gpu.register(KIND, lambda name: asked.append(name) or True)
assert "triton" not in sys.modules
operator, where = torch.ops.laconic.grouped_linear, KIND.lower()
codes, scales = torch.randint(0, 256, (8, 16), dtype=torch.uint8).to(where), torch.randn(8, 1).bfloat16().to(where)
x = torch.randn(3, 32).to(where)
wanted = linear.reference_linear(x, codes, scales, None, Grid(4, None, True))
for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with mode():
        assert torch.allclose(operator(x, codes, scales, None, 4, 0), wanted, atol=1e-4)
assert asked == ["grouped_linear"] * 3, asked
assert "triton" in sys.modules
grown = x.clone().requires_grad_()
operator(grown, codes, scales, None, 4, 0).sum().backward()
assert grown.grad is not None and len(asked) == 3
with torch.no_grad():
    operator(grown, codes, scales, None, 4, 0)
assert len(asked) == 4
compiled = torch.compile(lambda x: operator(x, codes, scales, None, 4, 0) * 2, backend="aot_eager", fullgraph=True)
assert torch.allclose(compiled(x), wanted * 2, atol=1e-4) and len(asked) == 5
dense = torch.ops.laconic.grouped_dense(codes, scales, None, 4, 0, 32)
assert torch.equal(dense, linear.reference_dense(codes, scales, None, Grid(4, None, True), 32)) and asked[-1] == "grouped_dense"
for name in ("hadamard", "unhadamard"):
    turn, plain, before = getattr(torch.ops.laconic, name), getattr(hadamard, f"reference_{name}"), len(asked)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(turn(x), plain(x), atol=1e-5)
    assert asked[before:] == [name] * 3
    given = [x.clone().requires_grad_() for _ in range(2)]
    for one, how in zip(given, (turn, plain)):
        (how(one) ** 3).sum().backward()
    assert torch.allclose(given[0].grad, given[1].grad, atol=1e-4) and len(asked) == before + 3
    again = torch.compile(lambda x: turn(x) * 2, backend="aot_eager", fullgraph=True)
    assert torch.allclose(again(x), plain(x) * 2, atol=1e-5) and len(asked) == before + 4
print("all in place")
"""


def program(text: str, **env: str) -> str:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_operators_reach_the_kernels_and_gradients_the_reference() -> None:
    # in a process of its own: on the processor, kernels take the place of the native ones
    assert "all in place" in program(f"KIND = {HERE.upper()!r}\n{IN_PLACE}")


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laconic.kernels.attention import Grouped, Plain
from laconic.kernels.bits import packed_width
from laconic.kernels.gpu import attention, hadamard, linear

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int64: "i64", torch.int32: "i32"}
LIMIT = {80: 163 * 1024, 90: 227 * 1024}
count = 0


class Compiled:
    # in the place of a kernel: what it is called with is compiled for a GPU that is not there

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, num_stages=3, **words):
        global count
        given = dict(zip(self.kernel.arg_names, args)) | words
        kinds, fixed, known = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                kinds[name], fixed[(at,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                kinds[name], known[(at,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
            else:
                kinds[name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    known[(at,)] = [["tt.divisibility", 16]]
        for arch, limit in LIMIT.items():
            target, options = GPUTarget("cuda", arch, 32), {"num_warps": num_warps, "num_stages": num_stages}
            made = triton.compile(ASTSource(self.kernel, kinds, fixed, known), target=target, options=options)
            assert made.asm["cubin"] and made.metadata.shared <= limit, (self.kernel.__name__, arch, made.metadata.shared)
            count += 1


for module in (linear, attention, hadamard):
    for name in ("_one", "_many", "_dense", "_split", "_joined", "_kept_blocks", "_sylvester"):
        if hasattr(module, name):
            setattr(module, name, Compiled(getattr(module, name)))
n = m = 1024
for bits, group, zeros in ((4, 128, True), (4, 100, True), (3, 64, False)):
    codes, scales = torch.zeros(n, packed_width(m, bits), dtype=torch.uint8), torch.zeros(n, -(-m // group), dtype=torch.bfloat16)
    held = codes, scales, torch.zeros(n, packed_width(-(-m // group), bits), dtype=torch.uint8) if zeros else None
    linear.grouped_dense(*held, bits, group, m)
    for rows, dtype in ((1, torch.bfloat16), (64, torch.bfloat16), (64, torch.float32)):
        linear.grouped_linear(torch.zeros(rows, m, dtype=dtype), *held, bits, group)
for bits, name, group, kind in ((8, "e4m3", 0, "bf16"), (4, "e2m1", 32, "e8m0"), (4, "e2m1", 16, "e4m3"), (4, "codebook", 64, "bf16")):
    codes, groups = torch.zeros(n, packed_width(m, bits), dtype=torch.uint8), -(-m // (group or m))
    scales = torch.zeros(n, groups, dtype=torch.bfloat16 if kind == "bf16" else torch.uint8)
    whole, table = torch.ones(1) if kind == "e4m3" else None, torch.zeros(2**bits).bfloat16() if name == "codebook" else None
    for rows in (1, 64):
        linear.lookup_linear(torch.zeros(rows, m, dtype=torch.float16), codes, scales, whole, table, bits, name, group, kind)
for width, dtype in ((4096, torch.bfloat16), (14336, torch.float16), (16384, torch.float32)):
    hadamard.hadamard(torch.zeros(4, width, dtype=dtype))


def half(bits, along, dtype, d=128, group=32, n=256):
    entries, r, m = (n // group, d, group) if along else (n, 1, d)
    codes = torch.zeros(1, 8, entries, r, packed_width(m, bits), dtype=torch.uint8)
    small = torch.zeros(1, 8, entries, r, m // group, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
    rest = Plain((torch.zeros(1, 8, 128, d, dtype=dtype),), (128,))
    return [Grouped((codes, codes), (small, small), (small, small), (2 * entries,), bits, group, along, d), rest]


for bits, dtype in ((2, torch.bfloat16), (8, torch.float16), (3, torch.float32)):
    query = torch.zeros(1, 32, 1, 128, dtype=dtype)
    attention.held_attention(query, half(bits, True, dtype), half(bits, False, dtype), torch.ones(1, 1, 640).bool(), splits=8)
for dtype in (torch.bfloat16, torch.float32):
    x = torch.zeros(1, 2, 256, 128, dtype=dtype)
    attention.block_attention(x, x, x, torch.ones(1, 2, 2, 2).bool(), 128)
print(count, "compiled")
"""


@pytest.mark.long
def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    assert "compiled" in program(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
