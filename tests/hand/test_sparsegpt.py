"""SparseGPT against least squares by brute force: what the columns still free can make up for is solved for anew at every step."""

from __future__ import annotations

import pytest
import torch

from laconic.core.score import NofM, keep_top
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.core.statistic import Gram
from laconic.kernels.grids import Grid
from laconic.kernels.obs import inverse_factor
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.cut.sparsegpt import SparseGPT, sparsegpt
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.prune.score.wanda import Wanda
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN


def site(n: int, m: int) -> Site:
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def held(change):
    (form,) = change.hold.values()
    return form


def coloured(m: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40 * m, m, generator=g) @ torch.randn(m, m, generator=g)
    return x.T @ x / x.shape[0]


def loss(now: torch.Tensor, then: torch.Tensor, gram: torch.Tensor) -> float:
    delta = (now - then).double()
    return float(((delta @ gram.double()) * delta).sum())


def by_least_squares(weight: torch.Tensor, gram: torch.Tensor, kept: int, step: int) -> torch.Tensor:
    """One row, no Cholesky factor: every `step` columns, the `kept` stay whose removal would raise the loss most, columns to the left
    being settled and those to the right free; then column after column is settled, and those to the right are the best for all so far."""
    h, original = gram.double(), weight.double()
    m = weight.shape[0]

    def free(settled: torch.Tensor, at: int) -> torch.Tensor:
        """The row with columns before `at` as settled and the others as the least loss wants them."""
        push = (settled[:at] - original[:at]) @ h[:at, at:]
        rest = original[at:] - torch.linalg.solve(h[at:, at:], push) if at < m else original[at:]
        return torch.cat([settled[:at], rest])

    now = original.clone()
    for start in range(0, m, step):
        stop = min(start + step, m)
        now = free(now, start)
        rise = []
        for c in range(start, stop):
            # columns of this block before c stay as they now are
            without = now.clone()
            without[c] = 0.0
            without = free(without, c + 1)
            rise.append(float((without - original) @ h @ (without - original)) - float((now - original) @ h @ (now - original)))
        stays = sorted(range(start, stop), key=lambda c: -rise[c - start])[:kept]
        for c in range(start, stop):
            now = free(now, c)
            now[c] = now[c] if c in stays else 0.0
    return now.float()


def test_two_columns_by_hand():
    # H = [[1, .5], [.5, 1]]: dropping column 0 costs w0^2 (1 - .25) since column 1 makes up for part, dropping column 1 costs w1^2
    factor = inverse_factor(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), 0.0)
    out = sparsegpt(torch.tensor([[1.0, 2.0]]), factor, Sparsity(0.5))
    # column 1 takes over .5 of what column 0 gave
    torch.testing.assert_close(out.weight, torch.tensor([[0.0, 2.5]]))
    assert out.mask.tolist() == [[False, True]]
    # 1.1^2 * .75 = .9075 is less than 1: by magnitude, column 1 would go
    torch.testing.assert_close(sparsegpt(torch.tensor([[1.1, 1.0]]), factor, Sparsity(0.5)).weight, torch.tensor([[0.0, 1.55]]))
    # 1.2^2 * .75 = 1.08 is more: column 1 goes, and nothing is left of it to make up for it
    torch.testing.assert_close(sparsegpt(torch.tensor([[1.2, 1.0]]), factor, Sparsity(0.5)).weight, torch.tensor([[1.2, 0.0]]))


@pytest.mark.parametrize("seed", range(8))
def test_one_row_is_least_squares(seed):
    gram, w = coloured(8, seed), torch.randn(1, 8, generator=torch.Generator().manual_seed(100 + seed))
    factor = inverse_factor(gram, 0.0)
    # one mask for all, a mask for each 4 columns, and 2 of each 4
    for level, block, kept, step in (
        (Sparsity(0.5), 8, 4, 8),
        (Sparsity(0.5), 4, 2, 4),
        (Sparsity(0.5, 4), 8, 2, 4),
        (Sparsity(0.5, 4), 3, 2, 4),
    ):
        out = sparsegpt(w, factor, level, block=block)
        torch.testing.assert_close(out.weight[0], by_least_squares(w[0], gram, kept, step), rtol=1e-3, atol=1e-4)
        assert torch.equal(out.mask, out.weight != 0)


def test_blocks_change_when_errors_are_pushed_and_nothing_else():
    gram, w = coloured(40), torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    factor = inverse_factor(gram)
    level = Sparsity(0.5, 4)
    whole = sparsegpt(w, factor, level, block=40).weight
    for block in (4, 12, 16):
        torch.testing.assert_close(sparsegpt(w, factor, level, block=block).weight, whole, rtol=1e-4, atol=1e-4)


def test_a_block_keeps_its_share_over_all_rows():
    gram, w = coloured(48), torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    out = sparsegpt(w * torch.tensor([1.0, 2, 3, 4, 5])[:, None], inverse_factor(gram), Sparsity(0.25), block=16)
    assert [int(part.sum()) for part in out.mask.split(16, dim=1)] == [20, 20, 20]
    assert len(set(out.mask.sum(1).tolist())) > 1
    # rows of unlike counts are stored as one run of values
    form = held(SparseGPT(block=16)(site(5, 48), {"weight": w}, {Gram(): gram}, Sparsity(0.25)))
    assert form.nbytes == 5 * 6 + 2 * 5 * 12


def test_it_errs_less_than_dropping_and_never_less_than_the_best_for_its_mask():
    gram, w = coloured(32, 3), torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    stats = {Gram(): gram}
    for level in (Sparsity(0.5), Sparsity(0.5, 8), Sparsity(0.5, 4)):
        out = sparsegpt(w, inverse_factor(gram), level)
        ours = loss(out.weight, w, gram)
        for score in (Magnitude(), Wanda()):
            assert ours < 0.9 * loss(held(Drop(score)(site(16, 32), {"weight": w}, stats, level)).dense(), w, gram)
        best = 0.0
        for row, mask in zip(w.double(), out.mask, strict=True):
            h, k = gram.double(), mask.nonzero()[:, 0]
            solved = torch.zeros(32, dtype=torch.float64)
            solved[k] = torch.linalg.solve(h[k][:, k], h[k] @ row)
            best += loss(solved[None], row[None], gram)
        assert best <= ours


def test_white_inputs_leave_nothing_to_make_up_for():
    w = torch.randn(1, 24, generator=torch.Generator().manual_seed(4))
    stats = {Gram(): torch.eye(24)}
    for level in (Sparsity(0.5), Sparsity(0.5, 4), Sparsity(0.5, None, Grid(4, None)), Sparsity(0.25, None, Grid(3, None, symmetric=True))):
        ours = held(SparseGPT(RTN())(site(1, 24), {"weight": w}, stats, level))
        assert torch.equal(ours.dense(), held(Drop(Magnitude(), RTN())(site(1, 24), {"weight": w}, {}, level)).dense())


def test_keeping_all_on_a_grid_is_gptq():
    # whole rows on one grid, fitted before the first column: then both do the same
    gram, w = coloured(20, 5), torch.randn(7, 20, generator=torch.Generator().manual_seed(5))
    grid = Grid(3, None)
    ours = held(SparseGPT(RTN())(site(7, 20), {"weight": w}, {Gram(): gram}, Sparsity(1.0, None, grid)))
    theirs = held(GPTQ()(site(7, 20), {"weight": w}, {Gram(): gram}, grid))
    assert torch.equal(ours.dense(), theirs.dense())


@pytest.mark.parametrize("run", [None, 4])
def test_rounding_in_the_sweep_errs_less_than_after_it(run):
    gram, w = coloured(128, 6), torch.randn(24, 128, generator=torch.Generator().manual_seed(6))
    level = Sparsity(0.5, run, Grid(3, 16))
    change = SparseGPT(RTN())(site(24, 128), {"weight": w}, {Gram(): gram}, level)
    form = held(change)
    # every row keeps as many; codes, one scale and one zero for each of 4 groups of 16 kept weights
    assert form.nbytes == 24 * (128 // 8 + 64 * 3 // 8 + 4 * 2 + 2) == SparseGPT(RTN()).stored(site(24, 128), level)
    # the same rule of choice, on a grid so fine that it is not felt
    fine = Sparsity(0.5, run, Grid(8, 8))
    pruned = held(SparseGPT(RTN())(site(24, 128), {"weight": w}, {Gram(): gram}, fine)).dense()
    after = held(Drop(Magnitude(), RTN())(site(24, 128), {"weight": pruned}, {}, level)).dense()
    bare = loss(pruned, w, gram)
    assert loss(form.dense(), w, gram) - bare < 0.8 * (loss(after, w, gram) - bare)


def test_dead_channels_go_first_and_singular_hessians_are_named():
    gram = torch.zeros(6, 6)
    gram[:3, :3] = torch.ones(3, 3)
    w = torch.tensor([[0.1, 0.2, 0.3, 9.0, 8.0, 7.0]])
    change = SparseGPT(damping=0.0)(site(1, 6), {"weight": w}, {Gram(): gram}, Sparsity(0.5))
    assert held(change).dense()[0, 3:].tolist() == [0.0, 0.0, 0.0]
    assert any("3 of 6 input channels" in note for note in change.notes)
    assert any("singular" in note for note in change.notes)
    # with no token at all what is left to go by is magnitude
    change = SparseGPT()(site(1, 6), {"weight": w}, {Gram(): torch.zeros(6, 6)}, Sparsity(0.5))
    assert held(change).dense().tolist() == [[0.0, 0.0, 0.0, 9.0, 8.0, 7.0]]


def test_a_convolution_with_groups_has_a_hessian_for_each():
    grams = torch.stack([coloured(9, 7), coloured(9, 8)])
    w = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(7))
    conv = Site("c", Conv(), {"weight": TensorId("c.weight")}, (4, 1, 3, 3), context={"groups": 2})
    level = Sparsity(0.5, 3)
    form = held(SparseGPT()(conv, {"weight": w}, {Gram(): grams}, level))
    assert form.dense().shape == (4, 1, 3, 3)
    for rows, gram in ((slice(0, 2), grams[0]), (slice(2, 4), grams[1])):
        alone = held(SparseGPT()(site(2, 9), {"weight": w[rows].reshape(2, 9)}, {Gram(): gram}, level))
        assert torch.equal(form.dense()[rows].reshape(2, 9), alone.dense())


def test_n_of_m_holds_in_every_run_with_a_ragged_end():
    out = sparsegpt(torch.randn(3, 10), inverse_factor(coloured(10)), Sparsity(0.5, 4))
    assert [run.sum(1).tolist() for run in out.mask.split(4, dim=1)] == [[2] * 3, [2] * 3, [1] * 3]
    assert int(keep_top(torch.rand(3, 10), 1.0, among=NofM(2, 4)).sum()) == int(out.mask.sum())


def test_a_grid_needs_a_quantizer_that_takes_it():
    level = Sparsity(0.5, None, Grid(4, 8))
    for hold in (None, GPTQ()):
        with pytest.raises(ValueError, match="needs `hold`"):
            SparseGPT(hold)(site(2, 16), {"weight": torch.randn(2, 16)}, {Gram(): coloured(16)}, level)


def test_a_quantizer_that_rounds_again_is_refused():
    class Again(RTN):
        def __call__(self, site, weights, stats, level):
            return RTN()(site, {"weight": weights["weight"]}, stats, level)

    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="does not hold"):
        SparseGPT(Again())(site(4, 32), {"weight": w}, {Gram(): coloured(32)}, Sparsity(0.5, None, Grid(3, 8)))
