"""Claims of MambaQuant, on the small Mamba of the zoo: the rotations of QuaRot and plain rounding have the same grids, so the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from laconic.aligning import Aligned, align
from laconic.calibration import fed
from laconic.claims.lab import SEEDS, Bench, Duel, Found, Remembering, duel, gathered, measured, open_bench, quiet, spread
from laconic.core.claim import Claim, Lab, Paper
from laconic.core.transform import Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.rotate.hadamard import Hadamard
from laconic.methods.quantize.rotate.mambaquant import MambaQuant
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.recipe import Aligning

OURS = MambaQuant()
HOWS = {"MambaQuant": OURS, "Hadamard": MambaQuant(basis="hadamard", smooth=False), "RTN": MambaQuant(basis="none", smooth=False)}


def rewritten(bench: Bench, how: MambaQuant, seed: int) -> Aligned:
    def make() -> Aligned:
        named = Aligning(method="quantize.rotate.mambaquant")
        return align(bench.source, bench.drawn(seed), named, how, batch=bench.batch, work=Remembering(), progress=quiet)

    found: Aligned = bench.once(("rewritten", how, seed), make)
    return found


def rounded_found(bench: Bench, how: MambaQuant, bits: tuple[int, int], seed: int) -> Found:
    def make() -> Found:
        aligned = rewritten(bench, replace(how, scan=bits[1]), seed)
        model = aligned.load(torch.float32)
        level = WeightAndInputs(Grid(bits[0], None, symmetric=True), bits[1])
        held = 0
        for site in aligned.anatomy.sites():
            method: Transform = Inputs(RTN())
            if site.roles["part"] == "scan_out" and how.basis != "none":
                method = Hadamard(method)
            layer = model.get_submodule(site.name)
            weight: Tensor = layer.weight.data
            form = method(site, {"weight": weight}, {}, level).hold[site.tensors["weight"]]
            weight.copy_(form.dense())
            fed(layer, form)
            held += form.nbytes
        return measured(bench, model, held)

    found: Found = bench.once(("rounded", how, bits, seed), make)
    return found
