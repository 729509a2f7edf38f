"""ShiftAddViT by hand: powers of two, attention of additions, the balance, and parts that compute the same once they have settled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from laconic.core.packed import Held
from laconic.core.router import asking
from laconic.methods.quantize.mix.shiftaddvit import Attention, Mixture, ShiftAddViT, added, as_shifts, balance, powers, projections, shifts
from laconic.routing import begin, install

CONFIG = ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, attn_implementation="eager")
PROJECTIONS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (8, 8))


def test_a_shift_is_the_nearest_power_in_the_logarithm() -> None:
    weight = torch.tensor([[0.3, -1.1, 0.75, 0.7], [12.0, 5.0, -0.01, 0.0]])
    form = as_shifts(weight, 3)
    # of 8 to 1 for the second row: 12 is nearer to 16 in the logarithm, so 16 to 2
    assert form.dense().tolist() == [[0.25, -1.0, 1.0, 0.5], [16.0, 4.0, -2.0, 2.0]]
    assert powers(3).tolist() == [-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1]
    assert form.nbytes == form.bytes_of(2, 4, shifts(3)) == 2 * 2 + 2 + 16
    torch.testing.assert_close(as_shifts(form.dense(), 3).dense(), form.dense(), rtol=0, atol=0)
    assert as_shifts(torch.zeros(1, 4), 5).dense().abs().max() < 1e-30


def test_both_products_of_attention_are_sums_of_entries() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    near = torch.randn(8, 9)
    found = added(q, k, v, near)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    above = [x > x.mean() for x in unit]
    expected = torch.zeros_like(v)
    for h in range(2):
        for t in range(5):
            total = v[0, h, t] / 2
            for s in range(5):
                # how often both codes are 1, a count
                total = total + (above[0][0, h, t] & above[1][0, h, s]).sum() * v[0, h, s] / math.pi
            local = sum(near[4 * h : 4 * h + 4, s - t + 4] * v[0, h, s] for s in range(5) if 0 <= s - t + 4 < 9)
            expected[0, h, t] = total / total.norm() + local
    torch.testing.assert_close(found, expected)


def test_codes_of_an_image_do_not_depend_on_the_others() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 4, 2, 5, 4)
    near = torch.randn(8, 9)
    together = added(q, k, v, near)
    alone = torch.cat([added(*(x[i : i + 1] for x in (q, k, v)), near) for i in range(4)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("latency", [0.5, 0.6, 0.8])
def test_the_balance_is_least_where_tokens_follow_inverse_latency(latency: float) -> None:
    latencies = torch.tensor([latency, 1 - latency])
    logits = torch.zeros(64, 2, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        balance(logits, latencies).backward()
        optimiser.step()
    share = logits.detach().softmax(-1)[:, 0].mean()
    assert float(balance(logits, latencies).detach()) < 0.02
    assert float(share) == pytest.approx(1 - latency, abs=0.06)
    assert float(balance(torch.zeros(4, 2), torch.tensor([0.5, 0.5]))) == 0


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = ViTAttention(CONFIG), ViTMLP(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)[0]
        return y + self.mlp(y)


def routed() -> tuple[Both, dict[str, Attention | Mixture], Tensor]:
    torch.manual_seed(2)
    model = Both().eval().requires_grad_(False)
    x = torch.randn(3, 6, 8)
    parts: dict[str, Attention | Mixture] = {
        "attention": Attention(PROJECTIONS, 5, 0.5),
        "mlp": Mixture({"fc1": (12, 8), "fc2": (8, 12)}, 5, 0.5, 0.6, 0.01, True),
    }
    assert all(part.fits(path, model) for path, part in parts.items())
    install(model, parts)
    begin(parts, 0)
    for part in parts.values():
        part.requires_grad_(False)
    return model, parts, x


def test_parts_fit_only_what_they_can_stand_for() -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), "attention": nn.Module()})
    for name in PROJECTIONS:
        model["attention"].add_module(name, nn.Linear(8, 8))
    assert not Attention(PROJECTIONS, 5, 0.5).fits("attention", model)
    assert not Mixture({"0": (12, 8), "1": (8, 12)}, 5, 0.5, 0.6, 0.01, True).fits("mlp", model)
    assert projections(PROJECTIONS) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert projections({"query": (8, 8), "key": (8, 8), "value": (8, 8), "dense": (8, 8)}) == ("query", "key", "value", "dense")
    assert projections({"a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (8, 8)}) is None


def test_nobody_asked_is_the_module_as_it_was() -> None:
    model, parts, x = routed()
    torch.manual_seed(2)
    before = Both().eval()(x)
    with asking(parts.values(), "masked", "all"):
        torch.testing.assert_close(model(x), before)
    assert not torch.allclose(model(x), before, atol=1e-2)


def test_the_first_stage_changes_attention_alone_and_shifts_nothing() -> None:
    model, parts, x = routed()
    with asking(parts.values(), "learning", "router"):
        early = model(x)
        assert parts["mlp"].error is None
        for part in parts.values():
            part.penalty(0.49)
        torch.testing.assert_close(model(x), early)
        for part in parts.values():
            part.penalty(0.5)
        late = model(x)
        assert parts["mlp"].error is not None and not torch.allclose(late, early)
    # learning ends in what runs
    torch.testing.assert_close(late, model(x))


def test_settled_parts_compute_what_was_learned_and_hold_their_bytes() -> None:
    model, parts, x = routed()
    parts["mlp"].router.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    before = model(x)
    foretold = {path: part.settled() for path, part in parts.items()}
    for path, part in parts.items():
        forms = part.settle()
        assert {name: form.nbytes for name, form in forms.items()} == {name: size for name, size in foretold[path].items() if name}
    torch.testing.assert_close(model(x), before)
    assert isinstance(model.attention.q_proj, Held) and isinstance(model.mlp.fast["fc1"], Held)
    own = {path: set(dict(part.named_parameters(recurse=False))) for path, part in parts.items()}
    kept = [t for name, t in model.state_dict().items() if name.startswith("mlp.fast") or name == "mlp.router"]
    assert own["attention"] == {"near"} and own["mlp"] == {"router"}
    assert sum(t.numel() * (t.element_size() if not t.is_floating_point() else 2) for t in kept) == foretold["mlp"][""]
    # and again, from what is described
    twin = Both().eval().requires_grad_(False)
    for path, part in parts.items():
        again = type(part).restore(part.describe())
        again.around(path, twin)
        twin.register_module(path, again)
    there = dict(twin.named_modules())
    for name, module in model.named_modules():
        if name.endswith("proj"):
            owner, _, leaf = name.rpartition(".")
            there[owner].register_module(leaf, module)
    twin.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(twin(x), before)


def test_gathered_is_masked_and_counts_by_tokens() -> None:
    model, parts, x = routed()
    mixture = parts["mlp"]
    mixture.router.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(1)))
    gathered = model(x)
    with asking(parts.values(), "masked", "router"):
        torch.testing.assert_close(model(x), gathered)
    for part in parts.values():
        part.forget()
    with asking(parts.values(), "masked", "labels"):
        model(x)
    load = mixture.load
    many = round(18 * 0.4)
    assert load.dense == 2 * 96 and load.expected == pytest.approx(2 * 96 * many / 18 + 16) and load.worst == 2 * 96 + 16
    # of attention only the convolution multiplies
    assert parts["attention"].load.expected == 8 * 9 and parts["attention"].load.dense == 4 * 64


def test_one_primitive_alone_for_all_tokens() -> None:
    _, parts, _ = routed()
    mixture = parts["mlp"]
    y = torch.randn(4, 8)
    mixture.router.copy_(torch.stack([torch.zeros(8), torch.ones(8)]))
    whole, quick = mixture._layer[0](y), mixture._quick(y)
    p = torch.stack([torch.zeros(4), y.sum(1)], 1).softmax(1)
    expected = torch.where((p[:, 0] >= p[:, 1])[:, None], whole, quick) * p.amax(1, keepdim=True)
    torch.testing.assert_close(mixture(y), expected)


def test_what_cannot_be_is_said() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"until": 1.0}, {"latency": 0.0}, {"steps": 0}, {"weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShiftAddViT(**wrong)
    model, _, x = routed()
    with pytest.raises(ValueError, match="no mask"):
        model.attention(x, torch.zeros(3, 1, 6, 6))
