"""Each method on a case small enough to work out by hand or by brute force; expected numbers are literal."""

from __future__ import annotations

import itertools
import json

import torch

from laconic.core.menu import Budget, Cost, Damage, Menu, Row
from laconic.core.packed import restore
from laconic.core.score import Unit
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Fisher, Gram
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import Grid, decode, encode, fit_clipped, fit_range, notched, notches
from laconic.kernels.lowrank import low_rank
from laconic.kernels.obs import inverse_factor, predicted_loss, round_columns
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.prune.score.wanda import Wanda, wanda
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.residual.lorc import Compensated, LoRC
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.allocate.uniform import Uniform


def site(n: int, m: int) -> Site:
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def held(change):
    (form,) = change.hold.values()
    return form


def test_pack_by_hand():
    # 3-bit codes 1, 2, 3, 4 from the low end: 001, 010, 011, 100 -> bits 100 011 010 001 -> bytes 0xD1, 0x08
    assert pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 3).tolist() == [[0xD1, 0x08]]
    assert pack(torch.tensor([[1, 2]], dtype=torch.uint8), 4).tolist() == [[0x21]]
    for bits, m in itertools.product(range(1, 9), (1, 2, 7, 8, 9, 31)):
        codes = torch.randint(0, 2**bits, (3, m), dtype=torch.uint8)
        assert pack(codes, bits).shape == (3, packed_width(m, bits))
        assert torch.equal(unpack(pack(codes, bits), bits, m), codes)


def test_rtn_by_hand():
    # least -1, greatest 2, two bits: scale 1, zero 1; codes 0..3 stand for -1, 0, 1, 2
    w = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    form = held(RTN()(site(1, 4), {"weight": w}, {}, Grid(2, None)))
    assert form.dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    # codes 1 byte, one bf16 scale, one packed zero
    assert form.nbytes == 1 + 2 + 1
    # symmetric, 2 bits: scale = 2 * 2 / 3 in bf16, codes -2..1
    form = held(RTN()(site(1, 4), {"weight": w}, {}, Grid(2, None, symmetric=True)))
    assert form.dense().tolist() == [[-1.3359375, 0.0, 0.0, 1.3359375]]
    assert form.nbytes == 1 + 2


def test_rtn_ragged_last_group_has_its_own_scale():
    w = torch.tensor([[0.0, 3.0, 0.0, 30.0, 0.0, 300.0, 7.0]])
    form = held(RTN()(site(1, 7), {"weight": w}, {}, Grid(2, 2)))
    assert form.scales.shape == (1, 4)
    assert torch.equal(form.dense(), torch.tensor([[0.0, 3.0, 0.0, 30.0, 0.0, 300.0, 6.984375]]))


def test_scales_of_8_bits_by_hand():
    # powers of 2^(1/32): 2^0, 2^(1/32) = 1.0219 (1.0234375 in bf16), 2^-1; halfway between two of them is 1.01089
    assert notches(torch.tensor([1.0, 1.0108, 1.0110, 0.5, 0.0])).tolist() == [0, 0, 1, -32, -4032]
    assert notched(torch.tensor([0, 1, -32, 31, -4032, 33])).tolist() == [1.0, 1.0234375, 0.5, 1.9609375, 2.0**-126, 2.046875]
    every = torch.arange(-3000, 3000)
    assert torch.equal(notches(notched(every)), every.to(torch.int32))
    assert torch.equal(notched(every).to(torch.bfloat16).float(), notched(every))
    # least and greatest 0 and 3: scale 1, stored as 255 above -255. The second row's scale would be 2^-10; the finest that can be stored
    # beside 1 is 2^(-255/32) = 0.003998 (0.00399780 in bf16), and 0.0029 is 0.73 of it
    w = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0029, 0.001]])
    grid = Grid(2, None, scales="log8")
    form = held(RTN()(site(2, 4), {"weight": w}, {}, grid))
    assert (form.scales.dtype, form.scales.tolist(), form.least.tolist()) == (torch.uint8, [[255], [0]], [-255])
    assert form.dense().tolist() == [[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.003997802734375, 0.0]]
    # codes 2 x 1 byte, scales 2 x 1, zeros 2 x 1, and 2 for all
    assert form.nbytes == 8 == RTN().stored(site(2, 4), grid)
    # found one after another, as GPTQ does: a scale that cannot be stored is raised, and its codes are chosen again
    codes, scale, zero = torch.tensor([[0, 1, 2, 3], [0, 0, 3, 1]], dtype=torch.uint8), torch.tensor([[1.0], [2.0**-10]]), torch.zeros(2, 1)
    late = Grouped.of((2, 4), grid, codes, scale, zero)
    assert all(torch.equal(late.tensors()[name], tensor) for name, tensor in form.tensors().items())
    # rows of zeros are in nobody's way, and a matrix of nothing but zeros is one
    form = held(RTN()(site(2, 4), {"weight": torch.tensor([[0.0] * 4, [0.0, 0.01, 0.02, 0.03]])}, {}, grid))
    assert form.dense()[0].tolist() == [0.0] * 4 and torch.allclose(form.dense()[1], torch.tensor([0.0, 0.01, 0.02, 0.03]), rtol=0.012)
    assert not held(RTN()(site(2, 4), {"weight": torch.zeros(2, 4)}, {}, grid)).dense().any()


def test_scales_of_8_bits_cost_half_and_lose_nothing():
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=draw) * torch.randn(64, 1, generator=draw).exp()
    errors = {}
    for scales in ("bf16", "log8"):
        grid = Grid(3, 32, scales=scales)
        form = held(RTN()(site(64, 256), {"weight": w}, {}, grid))
        assert form.nbytes == Grouped.bytes_of(64, 256, grid) == 64 * (96 + 3 + 8 * (2 if scales == "bf16" else 1)) + (scales == "log8") * 2
        again = restore(json.loads(json.dumps(form.describe())), form.tensors())
        assert torch.equal(again.dense(), form.dense())
        assert torch.equal(again.rows(slice(3, 9)), form.dense()[3:9])
        x = torch.randn(5, 256, generator=draw)
        torch.testing.assert_close(again.matmul(x), x @ form.dense().T, rtol=1e-4, atol=1e-4)
        # what a product has asked for is not stored
        assert again.nbytes == form.nbytes
        errors[scales] = float((form.dense() - w).square().mean())
    assert errors["log8"] < 1.01 * errors["bf16"]


def test_zeros_half_way_by_hand():
    # -1.5, -0.5, 0.5, 1.5: scale 1; the zero would be 1.5, which whole numbers miss by half a step
    w = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
    half = held(RTN()(site(1, 4), {"weight": w}, {}, Grid(2, None, zeros="half")))
    assert half.dense().tolist() == w.tolist()
    # codes 1 byte, scale 2, one zero of 3 bits: 1.5 is three halves
    assert (half.nbytes, half.zeros.tolist()) == (4, [[3]])
    whole = held(RTN()(site(1, 4), {"weight": w}, {}, Grid(2, None)))
    assert whole.dense().tolist() == [[-2.0, 0.0, 0.0, 1.0]]
    # symmetric: no zero is stored, the outermost codes are the greatest weight and its opposite
    both = held(RTN()(site(1, 4), {"weight": torch.tensor([[-0.4, -1.5, 0.1, 0.9]])}, {}, Grid(2, None, symmetric=True, zeros="half")))
    assert both.dense().tolist() == [[-0.5, -1.5, 0.5, 0.5]]
    assert both.nbytes == 3
    for form in (half, both):
        assert form.nbytes == Grouped.bytes_of(1, 4, form.grid)
        again = restore(json.loads(json.dumps(form.describe())), form.tensors())
        assert torch.equal(again.dense(), form.dense())
        assert torch.equal(again.matmul(torch.eye(4)).T, form.dense())


def test_clipping_helps_where_one_weight_is_far_out():
    w = torch.tensor([[0.1, -0.1, 0.12, -0.09, 0.11, -0.12, 0.08, 1.0]])
    grid = Grid(2, None)
    quiet = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0.001])

    def loss(scale, zero):
        return float(((decode(encode(w, scale, zero, grid), scale, zero, grid) - w).square() * quiet).sum())

    assert loss(*fit_clipped(w, grid, quiet, least=0.1)) < 0.5 * loss(*fit_range(w, grid))


def test_gptq_two_columns_by_hand():
    # H = [[1, .5], [.5, 1]] without damping: after column 0 errs by e, the best column 1 moves by + e * .5
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    grid = Grid(2, None)
    w = torch.tensor([[0.4, 0.55], [0.0, 3.0]])
    factor = inverse_factor(gram, 0.0)
    (out,) = round_columns(w[1:], factor, [grid])
    assert out.codes.tolist() == [[0, 3]]
    # row range 0 .. 3, scale 1: force the same grid on the first row by widening it with a third, unseen column
    w = torch.tensor([[0.4, 0.55, 3.0]])
    gram = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    (out,) = round_columns(w, inverse_factor(gram, 0.0), [grid])
    # column 0: 0.4 -> 0, error 0.4 pushed: column 1 becomes 0.55 + 0.5 * 0.4 = 0.75 -> 1; nearest alone would be 1 too, loss by formula
    assert out.codes.tolist() == [[0, 1, 3]]
    # 0.45 alone rounds to 0; with the push of 0.2 it becomes 0.65 -> 1
    (out,) = round_columns(torch.tensor([[0.4, 0.45, 3.0]]), inverse_factor(gram, 0.0), [grid])
    assert out.codes.tolist() == [[0, 1, 3]]
    assert encode(torch.tensor([[0.4, 0.45, 3.0]]), *fit_range(torch.tensor([[0.4, 0.45, 3.0]]), grid), grid).tolist() == [[0, 0, 3]]


def test_gptq_equals_rtn_on_white_inputs_and_beats_it_on_coloured_ones():
    torch.manual_seed(0)
    w = torch.randn(8, 8)
    eye = {Gram(): torch.eye(8)}
    assert torch.equal(
        held(GPTQ()(site(8, 8), {"weight": w}, eye, Grid(3, 4))).codes, held(RTN()(site(8, 8), {"weight": w}, {}, Grid(3, 4))).codes
    )
    x = torch.randn(200, 8) @ torch.randn(8, 8)
    gram = x.T @ x / 200

    def loss(form):
        delta = form.dense() - w
        return float(((delta @ gram) * delta).sum())

    ours = loss(held(GPTQ()(site(8, 8), {"weight": w}, {Gram(): gram}, Grid(3, 8))))
    near = loss(held(RTN()(site(8, 8), {"weight": w}, {}, Grid(3, 8))))
    assert ours < 0.8 * near


def test_gptq_names_dead_channels_and_singular_hessians():
    gram = torch.zeros(6, 6)
    gram[:3, :3] = torch.ones(3, 3)
    change = GPTQ()(site(2, 6), {"weight": torch.randn(2, 6)}, {Gram(): gram}, Grid(4, 6))
    assert any("3 of 6 input channels" in note for note in change.notes)
    assert torch.isfinite(held(change).dense()).all()


def test_low_rank_is_the_discarded_energy():
    torch.manual_seed(1)
    error = torch.randn(6, 8)
    left, right = low_rank(error, 2)
    spectrum = torch.linalg.svdvals(error)
    torch.testing.assert_close((error - left @ right).square().sum(), spectrum[2:].square().sum())


def test_lorc_lowers_the_weight_error_and_counts_its_factors():
    torch.manual_seed(2)
    w = torch.randn(8, 8)
    level = Compensated(Grid(2, 8), rank=2)
    form = held(LoRC(RTN())(site(8, 8), {"weight": w}, {}, level))
    bare = held(RTN()(site(8, 8), {"weight": w}, {}, level.first))
    assert (form.dense() - w).norm() < (bare.dense() - w).norm()
    # codes 2 bytes, scale 2, zero 1 for each of 8 rows; factors: 2 rows of 8 bytes and one scale each, twice
    assert form.nbytes == 8 * (2 + 2 + 1) + 2 * (2 * (8 + 2))


def test_wanda_by_hand():
    w = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert wanda(w, gram).tolist() == [[2.0, 2.0], [6.0, 0.5]]
    assert Wanda()(Unit(site(2, 2), w), {Gram(): gram}).tolist() == [[2.0, 2.0], [6.0, 0.5]]
    assert Magnitude()(Unit(site(2, 2), w), {}).tolist() == [[1.0, 2.0], [3.0, 0.5]]


def test_drop_by_hand():
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, 6.0, 5.0]])
    form = held(Drop(Magnitude())(site(2, 4), {"weight": w}, {}, Sparsity(keep=0.5)))
    assert form.dense().tolist() == [[0.0, 0.0, 3.0, -4.0], [8.0, 7.0, 0.0, 0.0]]
    # one mask byte a row, two bf16 values a row
    assert form.nbytes == 2 * 1 + 2 * 2 * 2
    form = held(Drop(Magnitude())(site(2, 4), {"weight": w}, {}, Sparsity(keep=0.5, run=2)))
    assert form.dense().tolist() == [[0.0, -2.0, 0.0, -4.0], [8.0, 0.0, 6.0, 0.0]]


def test_predicted_loss_by_hand():
    # one output channel with Fisher 2, error (1, 0) under gram diag(3, 1): 1/2 * 2 * 3
    assert predicted_loss(torch.tensor([[1.0, 0.0]]), torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([2.0])) == 3.0
    assert Fisher() == Fisher()


def _row(tensor: str, bits: int, size: int, damage: float) -> Row:
    return Row(frozenset({tensor}), "m", {"bits": bits}, Cost(size), Damage(damage, "nats/token", "here"), tensor)


def test_knapsack_is_brute_force():
    torch.manual_seed(3)
    menu = Menu(tuple(_row(f"t{t}", b, 10 * b + t, float(torch.rand(1)) * 4.0**-b) for t in range(4) for b in (2, 3, 4)), fixed=5)
    for budget in range(100, 200, 7):
        best = min(
            (sum(r.damage.value for r in pick) for pick in itertools.product(*[menu.rows[3 * t : 3 * t + 3] for t in range(4)])
             if 5 + sum(r.cost.bytes for r in pick) <= budget),
            default=None,
        )  # fmt: skip
        if best is not None:
            plan = Knapsack()(menu, Budget(budget), judge=None, rng=torch.Generator(), log=print)
            assert abs(plan.damage.value - best) < 1e-9


def test_knapsack_rows_that_cover_others_and_requirements():
    rows = (
        _row("a", 4, 40, 0.1), _row("a", 2, 20, 1.0), _row("b", 4, 40, 0.1), _row("b", 2, 20, 1.0),
        Row(frozenset({"a", "b"}), "drop", {}, Cost(0), Damage(1.5, "nats/token", "here"), "both"),
    )  # fmt: skip
    plan = Knapsack()(Menu(rows), Budget(30), judge=None, rng=torch.Generator(), log=print)
    assert [row.method for row in plan.rows] == ["drop"]
    bound = (rows[0], rows[1]._replace(requires=(3,)), rows[2], rows[3], rows[4])
    plan = Knapsack()(Menu(bound), Budget(60), judge=None, rng=torch.Generator(), log=print)
    assert {(row.site, row.level.get("bits")) for row in plan.rows} == {("a", 4), ("b", 2)}


def test_uniform_takes_the_finest_that_fits():
    menu = Menu(tuple(
        Row(frozenset({t}), "m", {"bits": b, "group": g}, Cost(10 * b + (64 // g)), Damage(1.0, "nats/token", "here"), t)
        for t in "ab" for b in (3, 4) for g in (32, 64)
    ))  # fmt: skip
    plan = Uniform()(menu, Budget(82), judge=None, rng=torch.Generator(), log=print)
    assert {(row.level["bits"], row.level["group"]) for row in plan.rows} == {(4, 64)}
    plan = Uniform()(menu, Budget(81), judge=None, rng=torch.Generator(), log=print)
    assert {(row.level["bits"], row.level["group"]) for row in plan.rows} == {(3, 32)}


def test_half_of_the_weights_in_six_bits_are_no_finer_than_all_in_four():
    def row(tensor: str, method: str, level: dict) -> Row:
        return Row(frozenset({tensor}), method, level, Cost(40), Damage(1.0, "nats/token", "here"), tensor)

    grid, sparse = {"bits": 4, "group": 64}, {"keep": 0.5, "run": None, "grid": {"bits": 6, "group": 64}}
    menu = Menu(tuple(row(t, method, level) for t in "ab" for method, level in (("round", grid), ("drop", sparse))))
    plan = Uniform()(menu, Budget(80), judge=None, rng=torch.Generator(), log=print)
    assert {row.method for row in plan.rows} == {"round"}
