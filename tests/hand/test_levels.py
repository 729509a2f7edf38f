"""Float formats and codebooks by hand: the values of each format, scales of known blocks, a codebook found with pencil and paper."""

from __future__ import annotations

import pytest
import torch

from laconic.core.packed import Packed
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Gram
from laconic.kernels.levels import Levels, decode, encode, fit_scale, fit_table, lloyd, values
from laconic.kernels.place import kept
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.floats import Floats
from laconic.methods.quantize.round.lloyd import Lloyd
from laconic.methods.quantize.round.zeroquantfp import ZeroQuantFP
from laconic.methods.quantize.train.straight import Straight

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def held(weight: torch.Tensor, levels: Levels, clip: bool = False) -> Leveled:
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, tuple(weight.shape))
    (form,) = Floats(clip=clip)(site, {"weight": weight}, {}, levels).hold.values()
    assert isinstance(form, Leveled)
    return form


def test_values_of_the_formats():
    assert values("e2m1").tolist() == [*FP4, *(-v for v in FP4)]
    # 000.000 to 011.111: steps of 1/8 up to 2, of 1/4 up to 4, of 1/2 up to 7.5
    small = values("e2m3").tolist()[:32]
    assert small[:3] == [0.0, 0.125, 0.25] and small[15:18] == [1.875, 2.0, 2.25] and small[30:] == [7.0, 7.5]
    wide = values("e3m2").tolist()
    assert wide[:5] == [0.0, 0.0625, 0.125, 0.1875, 0.25] and wide[29:32] == [20.0, 24.0, 28.0] and wide[63] == -28.0
    e4m3, e5m2 = values("e4m3"), values("e5m2")
    for found, dtype in ((e4m3, torch.float8_e4m3fn), (e5m2, torch.float8_e5m2)):
        same = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = same.isfinite()
        assert torch.equal(found.float()[finite], same[finite]) and found[~finite].isnan().all()
    assert (e4m3.nan_to_num(0).max(), e5m2.nan_to_num(0).max()) == (448, 57344)
    assert (Levels.mxfp4().top, Levels(6, "e2m3").top, Levels(6, "e3m2").top, Levels.fp8().top, Levels(8, "e5m2").top) == (
        6,
        7.5,
        28,
        448,
        57344,
    )


def test_nearest_goes_to_the_even_number_from_the_middle():
    middle = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 99.0, -0.25, -0.75, -2.5, -5.0, -7.0]])
    levels = Levels(4, "e2m1", None)
    codes = encode(middle, torch.ones(1, 1), levels, None)
    assert decode(codes, torch.ones(1, 1), levels, None).tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, 6, 0, -1, -2, -4, -6]]
    # a zero has no sign
    assert codes[0, 9] == 0
    # as torch rounds to the formats it knows
    draw = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 30
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        wide = Levels(8, name, None)  # type: ignore[arg-type]
        near = decode(encode(draw, torch.ones(64, 1), wide, None), torch.ones(64, 1), wide, None)
        assert torch.equal(near, draw.to(dtype).float())


def test_mxfp4_of_a_known_block():
    """The greatest of the block, 7.5, has exponent 2, that of 6 too: the scale is 1, byte 127, and 7.5 is cut to 6. Of the next, 12, it
    is 3: scale 2. Of the last, shorter one, 0.09, it is -4: scale 2^-6; .09 / 2^-6 = 5.76 goes to 6."""
    weight = torch.zeros(1, 72)
    weight[0, :4] = torch.tensor([7.5, -3.4, 0.3, 0.2])
    weight[0, 32:35] = torch.tensor([12.0, 2.9, -5.1])
    weight[0, 64] = 0.09
    form = held(weight, Levels.mxfp4())
    assert form.scales.tolist() == [[127, 128, 121]]
    dense = form.dense()
    assert dense[0, :4].tolist() == [6.0, -3.0, 0.5, 0.0]
    assert dense[0, 32:35].tolist() == [12.0, 3.0, -6.0]
    assert float(dense[0, 64]) == 6 / 64
    # codes of two weights in a byte, the first in its low half: 6 is code 7, -3 is 8 + 5
    assert form.codes[0, :2].tolist() == [7 + 16 * 13, 1]
    # 36 bytes of codes, three scales
    assert form.nbytes == Leveled.bytes_of(1, 72, Levels.mxfp4()) == 39
    # with twice the scale 7.5 goes to 8: an error of .5^2 + .4^2 + .3^2 + .2^2 in place of 1.5^2 + .4^2 + .2^2 + .2^2
    clipped = held(weight, Levels.mxfp4(), clip=True)
    assert clipped.scales.tolist() == [[128, 128, 121]] and clipped.dense()[0, :4].tolist() == [8.0, -3.0, 0.0, 0.0]


def test_scales_of_zeros_and_at_the_ends_of_a_byte():
    levels = Levels.mxfp4()
    assert fit_scale(torch.tensor([[0.0], [2.0**-126], [3e38]]), levels).tolist() == [[2.0**-126], [2.0**-126], [2.0**125]]
    assert held(torch.zeros(2, 40), levels).dense().eq(0).all() and held(torch.zeros(2, 40), Levels.nvfp4()).dense().eq(0).all()
    assert held(torch.zeros(2, 40), Levels.fp8()).dense().eq(0).all()


def test_nvfp4_of_two_blocks():
    """The greatest weight, 2688 = 6 * 448, makes the matrix's number 1 and its block's scale 448, byte 0x7e. The other block's greatest,
    13.5, wishes for 2.25, which e4m3 has: 2 (1 + 1/8), byte 0x41; 5 / 2.25 = 2.22 goes to 2, so to 4.5."""
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([2688.0, 1000.0])
    weight[0, 16:18] = torch.tensor([-13.5, 5.0])
    form = held(weight, Levels.nvfp4())
    assert form.whole is not None and form.whole.tolist() == [1.0] and form.scales.tolist() == [[0x7E, 0x41]]
    assert form.dense()[0, [0, 1, 16, 17]].tolist() == [2688.0, 896.0, -13.5, 4.5]
    # 16 bytes of codes, two scales, one number of four bytes
    assert form.nbytes == Leveled.bytes_of(1, 32, Levels.nvfp4()) == 22
    # four times smaller weights: the same codes and scales under a fourth of the number
    less = held(weight / 4, Levels.nvfp4())
    assert torch.equal(less.codes, form.codes) and torch.equal(less.scales, form.scales) and less.whole.tolist() == [0.25]  # type: ignore[union-attr]


def test_a_codebook_of_two_bits():
    """Weights in four heaps, their means the levels. What is between two goes to the nearer one."""
    weight = torch.tensor([[-1.0, -0.875, -0.25, -0.125, 0.25, 0.375, 0.875, 1.0]])
    levels = Levels.codebook(2, None)
    scale = fit_scale(weight, levels)
    assert scale.tolist() == [[1.0]]
    table = fit_table(weight, scale, levels)
    assert table.tolist() == [-0.9375, -0.1875, 0.3125, 0.9375]
    assert encode(weight, scale, levels, table).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    # columns that weigh 3 to 1: each level at a fourth of the way, to bf16's 8 bits
    heavy = fit_table(weight, scale, levels, torch.tensor([3.0, 1.0] * 4))
    assert heavy.tolist() == [-0.96875, -0.21875, 0.28125, 0.90625]
    # a column that nothing enters has no say, and no input at all is as all alike
    assert fit_table(weight, scale, levels, torch.tensor([1.0, 0.0] * 4)).tolist() == [-1.0, -0.25, 0.25, 0.875]
    assert torch.equal(fit_table(weight, scale, levels, torch.zeros(8)), table)


def test_levels_of_a_normal_density_are_those_of_max():
    """Max 1960, 10.1109/TIT.1960.1057548, table I: the four levels for a normal density are at 0.4528 and 1.510 deviations."""
    at = torch.linspace(-6, 6, 8193, dtype=torch.float64)
    centre = (at[1:] + at[:-1]) / 2
    mass = torch.exp(-centre.square() / 2)
    found = lloyd(mass, mass * centre, 4, 6.0)
    torch.testing.assert_close(found, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=2e-3, rtol=0)


def test_lloyd_counts_columns_by_their_inputs():
    """Two columns, one of them loud: its weights get the levels."""
    weight = torch.tensor([[1.0, 0.3], [0.5, 0.25], [-0.5, -0.2], [-1.0, -0.3]])
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, (4, 2))
    loud = torch.diag(torch.tensor([1e6, 1e-6]))
    (form,) = Lloyd()(site, {"weight": weight}, {Gram(): loud}, Levels.codebook(2, 2)).hold.values()
    # each row's scale is its greatest weight, so the loud column is 1 or -1 everywhere and exact
    assert form.dense()[:, 0].tolist() == weight[:, 0].tolist()
    # 4 rows of a byte of codes and a scale of two, 4 levels of two bytes
    assert form.nbytes == 4 * (1 + 2) + 8


@pytest.mark.parametrize(
    "levels",
    [
        Levels.mxfp4(),
        Levels.nvfp4(),
        Levels.fp8(),
        Levels(6, "e2m3", 32, "e8m0"),
        Levels(6, "e3m2"),
        Levels(8, "e5m2"),
        Levels(1, "codebook"),
        Levels(3),
    ],
    ids=str,
)
def test_learned_levels_begin_with_what_is_held(levels: Levels):
    weight = torch.randn(12, 72, generator=torch.Generator().manual_seed(0))
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, (12, 72))
    method = Lloyd() if levels.table == "codebook" else Floats()
    (form,) = method(site, {"weight": weight}, {Gram(): torch.eye(72)}, levels).hold.values()
    soft = Straight().soften(form, weight)
    assert soft is not None
    begun = soft.harden()
    assert all(torch.equal(begun.tensors()[name], t) for name, t in form.tensors().items())
    # half-way between its level and the next a weight moves first: the other way round it would move last
    with torch.no_grad():
        toward = weight - form.dense()
        soft.position.add_(0.1 * torch.nn.functional.pad(toward.sign(), (0, soft.position[0].numel() - 72)).reshape(soft.position.shape))
        moved = soft.harden().dense()
    assert ((moved - form.dense()) * toward >= 0).all()


def test_gradients_of_learned_levels():
    """Levels 0, .5, 1, 1.5, 2, 3 at scale 2: at 2 the next ones are .5 below and 1 above, so a step is .75 on the mean, times the scale."""
    form = held(torch.tensor([[12.0, 4.0, -1.0]]), Levels(4, "e2m1", None))
    assert form.dense().tolist() == [[12.0, 4.0, -1.0]]
    soft = form.soften(form.dense())
    assert isinstance(soft, Packed) and soft is not None
    soft.dense().sum().backward()
    assert soft.position.grad.tolist() == [[[4.0, 1.5, 1.0]]]
    # d w / d log scale is w
    assert soft.step.grad.tolist() == [[15.0]]


def test_tables_first_asked_for_in_inference_can_be_learned_with():
    fresh = kept(values.__wrapped__)
    with torch.inference_mode():
        assert not fresh("e2m1").is_inference()


def test_levels_say_what_is_wrong():
    for wrong, said in (
        ({"bits": 5, "table": "e2m1"}, "numbers of e2m1 have 4 bits"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": 4, "table": "nf4"}, "tables are codebook, e2m1"),
        ({"bits": 4, "group": 0}, "at least one weight"),
        ({"bits": 4, "scales": "fp16"}, "stored as bf16, e8m0 or e4m3"),
    ):
        with pytest.raises(ValueError, match=said):
            Levels(**wrong)  # type: ignore[arg-type]
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, (4, 4))
    with pytest.raises(ValueError, match=r"quantize\.round\.lloyd"):
        Floats().stored(site, Levels.codebook(4))
    with pytest.raises(ValueError, match=r"quantize\.round\.floats"):
        Lloyd().stored(site, Levels.mxfp4())


def test_the_walk_over_columns_pushes_errors_as_gptq_does():
    """Two columns that always agree: what the first loses the second takes. 2.4 goes to 2, and 2.4 + .4 to 3, by itself to 2."""
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, (1, 3))
    weight, levels = torch.tensor([[2.4, 2.4, 6.0]]), Levels(4, "e2m1", None)
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    (form,) = ZeroQuantFP(damping=1e-4)(site, {"weight": weight}, {Gram(): gram}, levels).hold.values()
    assert form.dense().tolist() == [[2.0, 3.0, 6.0]]
    assert held(weight, levels).dense().tolist() == [[2.0, 2.0, 6.0]]
    # columns that have nothing to do with each other: round to nearest
    wide, where = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)), Site("a", Linear(), site.tensors, (6, 100))
    for level in (Levels.mxfp4(), Levels.nvfp4(), Levels.codebook(3, 32)):
        near = (Lloyd() if level.table == "codebook" else Floats())(where, {"weight": wide}, {Gram(): torch.eye(100)}, level)
        (walked,) = ZeroQuantFP()(where, {"weight": wide}, {Gram(): torch.eye(100)}, level).hold.values()
        (nearest,) = near.hold.values()
        assert torch.equal(walked.dense(), nearest.dense())
