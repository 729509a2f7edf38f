"""Claims of inputs rounded with the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from laconic.claims.lab import Bench, Duel, Found, duel, gathered, held, measured, open_bench, put
from laconic.core.claim import Claim, Lab, Paper
from laconic.kernels.grids import Grid
from laconic.kernels.inputs import rounded
from laconic.methods.quantize.round.rtn import RTN

GRID = Grid(8, None, symmetric=True)


def _by_token(x: Tensor, bits: int) -> Tensor:
    return rounded(x, bits)


def _by_tensor(x: Tensor, bits: int) -> Tensor:
    """One scale for all tokens that come together."""
    return rounded(x, bits, axes=x.dim())


def _by_another(x: Tensor, bits: int) -> Tensor:
    """A stand-in: each token by the scale of the one before it."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).roll(1, -2).clamp(min=1e-9) / top
    return (x / scale).round().clamp(-top, top) * scale


def _found(bench: Bench, how: Callable[[Tensor, int], Tensor], bits: int) -> Found:
    def make() -> Found:
        forms = held(bench, RTN(), GRID)
        model = bench.source.load(torch.float32)
        put(bench, model, forms)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and f"{name}.weight" in forms:
                layer.register_forward_pre_hook(lambda layer, args: (how(args[0], bits),))
        return measured(bench, model, sum(form.nbytes for form in forms.values()))

    found: Found = bench.once(("inputs", how, bits), make)
    return found


@gathered
def _finer(lab: Lab, how: Callable[[Tensor, int], Tensor]) -> Iterator[Duel]:
    bench = open_bench("nano", lab.data, lab.quick)
    assert bench is not None
    for bits in (8, 6):
        ours, theirs = (_found(bench, one, bits) for one in (how, _by_tensor))
        yield duel(f"W8A{bits}", [ours], [theirs], names=("a scale for each token", "one for all"))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="A scale for each token has a lower KL and perplexity than one for all tokens, at W8A8 and W8A6.",
        where=Paper("Yao et al.", 2022, "arXiv:2206.01861", "section 4.1"),
        scale="nano, all matrices of the blocks, one scale a row, 16 x 512 held-out tokens (in full 64 x 512), no chance in it",
        check=partial(_finer, how=_by_token),
        broken=partial(_finer, how=_by_another),
    ),
)
