"""AdaDim on matrices small enough to round by hand, in both directions of its groups."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.core.packed import Held, Transposed
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Gram
from laconic.kernels.grids import Grid
from laconic.kernels.obs import inverse_factor, round_within_columns
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.adadim import AdaDim
from laconic.methods.quantize.round.gptq import GPTQ


def form(weight, gram, grid, **knobs):
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, tuple(weight.shape))
    change = AdaDim(**knobs)(site, {"weight": weight}, {Gram(): gram}, grid)
    (held,) = change.hold.values()
    return held, change.notes


def test_a_loud_input_gets_groups_of_its_own():
    """Two bits are codes 0 to 3. In groups of a row 3 makes the step 1, and .375 and .25 go to 0: an error of 100 (.140625 + .0625). In
    groups of a column the steps are 1 and .125, and nothing errs."""
    weight = torch.tensor([[3.0, 0.375], [3.0, 0.25]])
    loud = torch.diag(torch.tensor([1.0, 100.0]))
    for compensate in (False, True):
        chosen, _ = form(weight, loud, Grid(2, 2), compensate=compensate)
        assert isinstance(chosen, Transposed) and torch.equal(chosen.dense(), weight)
        assert chosen.inner.codes.tolist() == [[0b1111], [0b1011]] and chosen.inner.scales.tolist() == [[1.0], [0.125]]
    usual, _ = form(weight, loud, Grid(2, 2), compensate=False, groups="output")
    assert isinstance(usual, Grouped) and usual.dense().tolist() == [[3.0, 0.0], [3.0, 0.0]]
    # two bytes of codes, four of scales, two of zeros, either way
    assert chosen.nbytes == usual.nbytes == 8


def test_a_sensitive_output_gets_groups_of_its_own():
    """The other way round: in groups of a column .375 and .25 drown beside 3."""
    weight = torch.tensor([[3.0, 3.0], [0.375, 0.25]])
    chosen, _ = form(weight, torch.eye(2), Grid(2, 2), compensate=False)
    assert isinstance(chosen, Grouped) and torch.equal(chosen.dense(), weight)
    other, _ = form(weight, torch.eye(2), Grid(2, 2), compensate=False, groups="input")
    assert other.dense().tolist() == [[3.0, 3.0], [0.0, 0.0]]


def test_the_walk_pushes_a_column_of_errors_on():
    """Column (2.6, 3) on steps of 1 becomes (3, 3); of the error (-.4, 0) the second column takes over H12 / H22 = 1/2: (1, 0) becomes
    (.8, 0), its step .8 / 3."""
    weight, gram = torch.tensor([[2.6, 1.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = round_within_columns(weight, inverse_factor(gram, 0.0), Grid(2, None))
    assert found.codes.tolist() == [[3, 3], [3, 0]] and found.zero.tolist() == [[0], [0]]
    torch.testing.assert_close(found.scale, torch.tensor([[1.0], [0.8 / 3]]), rtol=4e-3, atol=0)
    # without correlations nothing is pushed
    alone = round_within_columns(weight, inverse_factor(torch.eye(2), 0.0), Grid(2, None))
    torch.testing.assert_close(alone.scale, torch.tensor([[1.0], [1.0 / 3]]), rtol=4e-3, atol=0)


def test_groups_within_outputs_are_those_of_gptq():
    weight, x = torch.randn(24, 32), torch.randn(100, 32)
    gram, grid = x.T @ x / 100, Grid(3, 8)
    ours, _ = form(weight, gram, grid, groups="output")
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, (24, 32))
    (theirs,) = GPTQ()(site, {"weight": weight}, {Gram(): gram}, grid).hold.values()
    assert all(torch.equal(ours.tensors()[name], tensor) for name, tensor in theirs.tensors().items())


def test_unlike_bytes_are_said_and_groups_run_along_inputs():
    # 8 rows of 3 groups of 2 bits, a byte each; 6 rows of 4 groups, a byte each: 24 scales both; codes of 12 and of 16 bits in 2 bytes
    held, notes = form(torch.randn(8, 6), torch.eye(6), Grid(2, 2))
    assert isinstance(held, Grouped) and held.nbytes == 8 * (2 + 1) + 48
    assert notes == ("a: groups of 2 along inputs or outputs take 72 and 66 bytes; they run along inputs",)
    columns, notes = form(torch.randn(8, 6), torch.eye(6), Grid(2, 2), groups="input")
    assert isinstance(columns, Transposed) and columns.nbytes == 66 and not notes
    with pytest.raises(ValueError, match="groups=both"):
        AdaDim(groups="both")


def test_a_linear_layer_computes_with_groups_of_columns():
    weight, layer, x = torch.randn(24, 32), torch.nn.Linear(32, 24), torch.randn(3, 5, 32)
    held, _ = form(weight, torch.eye(32), Grid(4, 8), groups="input")
    thin = Held(held, layer, layer.bias.detach())
    expected = F.linear(x, held.dense(), layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(thin(x), expected, rtol=1e-5, atol=1e-5)
        # its product has no inputs in 8 bits, and says so
        assert not thin.round_inputs(8)
        thin.thaw(torch.float32)
        torch.testing.assert_close(thin(x), expected, rtol=1e-5, atol=1e-5)
