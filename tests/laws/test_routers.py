"""The laws of Router, run over every one that is found in the tree, in a decoder and in a network of convolutions: at full capacity the
model as it was, gathered = masked, what is counted is what was multiplied, names stay, and what is stored is the whole of it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from laconic.core.packed import Held
from laconic.core.part import restore_part
from laconic.core.router import Router, Settling, asking
from laconic.core.site import Conv, Linear, Sublayer
from laconic.core.transform import Layer
from laconic.measurement import load_of, outputs, routed
from laconic.models import open_model
from laconic.pipeline import learn_routed
from laconic.routing import begin, install, parts_of

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

ROUTERS = [(path, found.instance(cls)) for path, cls in found.classes(Router)]
each = pytest.mark.parametrize(("path", "router"), ROUTERS, ids=[path for path, _ in ROUTERS])


class Net(nn.Module):
    """Convolutions with and without a norm, with a bias, with a stride, around a sum; one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 12, (3, 1), 1, (1, 0))
        self.c = nn.Conv2d(12, 12, 3, 1, 1, groups=4)
        self.head = nn.Linear(12, 5)
        self.example_input = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.a(F.relu(self.bn1(self.stem(x))))))
        return self.head((self.c(F.relu(self.b(x))) + x).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2):
        # what training leaves: norms that are not the identity
        for value in (norm.running_mean, norm.bias.data):
            value.normal_()
        for value in (norm.running_var, norm.weight.data):
            value.uniform_(0.5, 1.5)
    return model.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    sides = {"image_size": 9, "patch_size": 3, "num_channels": 3, "num_labels": 5}
    model = ViTForImageClassification(
        ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **sides)
    )
    model.example_input = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return model.eval()


def case(router, tmp_path: Path):
    """An opened model that the router is for, and inputs for it."""
    generator = torch.Generator().manual_seed(1)
    if Conv in router.acts_on:
        return open_model(net()), torch.randn(24, 3, 9, 9, generator=generator)
    if Linear in router.acts_on:
        return open_model(vit()), torch.randn(24, 3, 9, 9, generator=generator)
    assert Sublayer in router.acts_on
    folder = tmp_path / "llama"
    if not folder.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            initializer_range=0.3, mlp_bias=True, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.data.normal_()
        model.save_pretrained(folder)
    return open_model(folder), torch.randint(0, 31, (6, 12), generator=generator)


def opened(router, tmp_path: Path, seed: int = 0):
    """The model with parts whose routers say different things for different inputs."""
    source, inputs = case(router, tmp_path)
    model = source.load(torch.float32)
    parts, _ = parts_of(source, router, model, inputs[:2])
    install(model, parts)
    begin(parts, seed)
    generator = torch.Generator().manual_seed(2)
    for part in parts.values():
        for name, parameter in part.named_parameters():
            if "." not in name and name not in ("weight", "bias"):
                parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
    return source, inputs, model.eval(), parts


def test_every_router_is_found():
    known = {"route.gate.factorllm", "route.gate.ftwt", "prune.activation.chess", "prune.activation.spark", "quantize.mix.shiftaddvit"}
    assert known <= {path for path, _ in ROUTERS}


@each
def test_at_full_capacity_the_model_is_as_it_was(path, router, tmp_path):
    source, inputs, model, parts = opened(router, tmp_path)
    before = outputs(source.load(torch.float32))(inputs)
    for run in ("gathered", "masked", "learning"):
        with asking(parts.values(), run, "all"), torch.no_grad():
            torch.testing.assert_close(outputs(model)(inputs), before, rtol=1e-6, atol=1e-6)
    load, _ = load_of(model, [inputs], source.task)
    with asking(parts.values(), "gathered", "all"):
        whole, _ = load_of(model, [inputs], source.task)
    assert load.dense == whole.dense <= whole.worst


@each
def test_gathered_is_masked(path, router, tmp_path):
    _, inputs, model, parts = opened(router, tmp_path)
    with torch.no_grad():
        gathered = outputs(model)(inputs)
        with asking(parts.values(), "masked", "router"):
            masked = outputs(model)(inputs)
        with asking(parts.values(), "masked", "all"):
            whole = outputs(model)(inputs)
        one_by_one = torch.cat([outputs(model)(one) for one in inputs.split(1)])
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)
    # what a row is given does not depend on its neighbours
    torch.testing.assert_close(one_by_one, gathered, rtol=1e-4, atol=1e-5)
    # and routing is at work
    assert float((gathered - whole).norm()) > 1e-2 * float(whole.norm())


def not_multiplied(parts, counter: FlopCounterMode) -> list[int]:
    """What torch counts while forms that parts have settled in are at work, as that comes: they take the place of products."""
    sums, before = [], []
    for part in parts:
        for layer in part.modules() if isinstance(part, Settling) else ():
            if isinstance(layer, Held):
                layer.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
                layer.register_forward_hook(lambda *_: sums.append(counter.get_total_flops() - before.pop()))
    return sums


@each
def test_what_is_counted_is_what_was_multiplied(path, router, tmp_path, monkeypatch):
    """As torch counts: of the products with weights, gathered, less those of attention, and of forms that are no products to it."""
    # native products are not torch's to count
    monkeypatch.setattr("laconic.kernels.skipping.native", lambda: None)
    source, inputs, model, parts = opened(router, tmp_path)
    for part in parts.values():
        if isinstance(part, Settling):
            part.settle()
    alone = any(part.alone for part in parts.values())
    batches = inputs.reshape(-1, 1).split(1) if alone else inputs.split(5)
    load, seen = load_of(model, batches, source.task)
    assert seen == (inputs.numel() if source.task == "text" else len(inputs))
    with asking(parts.values(), "masked", "router"):
        masked, _ = load_of(model, batches, source.task)
    assert masked == pytest.approx(load)
    assert 0 < load.expected <= load.worst
    with FlopCounterMode(display=False, depth=99) as counter, torch.no_grad():
        sums = not_multiplied(parts.values(), counter)
        for batch in batches if alone else [inputs]:
            outputs(model)(batch)
    said = {str(op): flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    counted = sum(flops for op, flops in said.items() if "bmm" not in op and "attention" not in op) - sum(sums) / 2
    assert load.expected * seen == pytest.approx(counted)


@each
def test_names_stay_and_what_is_stored_is_all(path, router, tmp_path):
    source, inputs, model, parts = opened(router, tmp_path)
    names = set(source.load(torch.float32).state_dict())
    own = {f"{at}.{leaf}" for at, part in parts_of(source, router, source.skeleton())[0].items() for leaf, _ in part.named_parameters()}
    stored = model.state_dict()
    assert set(stored) == names | own
    assert all(name.startswith(tuple(f"{at}." for at in parts)) for name in own)
    # read again: described parts into a model without weights, then its tensors
    again = source.skeleton()
    install(again, {at: restore_part(json.loads(json.dumps(part.describe()))) for at, part in parts.items()})
    again.load_state_dict(stored, assign=True)
    with torch.no_grad():
        assert torch.equal(outputs(again)(inputs), outputs(model)(inputs))
    assert [part.describe() for part in routed(again)] == [part.describe() for part in parts.values()]


@each
def test_copies_are_apart(path, router, tmp_path):
    _, inputs, model, parts = opened(router, tmp_path)
    with torch.no_grad():
        before = outputs(model)(inputs)
        second = copy.deepcopy(model)
        for part in parts.values():
            for parameter in part.parameters():
                parameter.zero_()
            part.asks = "all"
        outputs(model)(inputs[:1])
        assert torch.equal(outputs(second)(inputs), before)


@each
def test_learning_is_deterministic_and_its_labels_are_learned(path, router, tmp_path):
    if router.lesson is None:
        pytest.skip("learns nothing by steps")
    router = dataclasses.replace(router, steps=24, batch=2)
    assert not isinstance(router.lesson.scope, Layer)
    source, inputs, _, _ = opened(router, tmp_path)
    runs = [learn_routed(source, source, inputs, router, seed=seed, folder=tmp_path / "shelf") for seed in (0, 0, 1)]
    states = [run[0].state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])

    def error(model: nn.Module) -> float:
        parts = routed(model)
        with asking(parts, "learning", "router"), torch.no_grad():
            outputs(model)(inputs)
        return sum(float(part.error) for part in parts)

    begun = source.load(torch.float32)
    parts, _ = parts_of(source, router, begun, inputs[:2])
    install(begun, parts)
    begin(parts, 0)
    with asking(parts.values(), "masked", "labels"), torch.no_grad():
        outputs(begun)(inputs)
    if any(part.error is None for part in parts.values()):
        assert not any(part.error is not None for part in parts.values())
        return  # labels say what it will cost, and are not learned
    assert error(runs[0][0]) < error(begun)
    # the routers stay where the method says so
    assert all(part.penalty(0.0) is not None for part in runs[0][1].values())


@each
def test_looking_is_deterministic_and_leaves_the_weights(path, router, tmp_path):
    if router.lesson is not None:
        pytest.skip("learns by steps")
    source, inputs, _, _ = opened(router, tmp_path)
    states = [learn_routed(source, source, inputs, router, seed=seed, folder=tmp_path / "shelf")[0].state_dict() for seed in (0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before = source.load(torch.float32).state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in before.items())
    assert any(float(states[0][name].abs().sum()) > 0 for name in states[0].keys() - before.keys())


@each
def test_nothing_is_lost_to_what_is_dead_or_constant(path, router, tmp_path):
    _, inputs, model, parts = opened(router, tmp_path)
    dead = torch.zeros_like(inputs)
    with torch.no_grad():
        for asks in ("router", "labels"):
            with asking(parts.values(), "masked", asks):
                assert torch.isfinite(outputs(model)(dead)).all()
        assert torch.isfinite(outputs(model)(dead)).all()
        for part in parts.values():
            for parameter in part.parameters():
                parameter.zero_()
        with asking(parts.values(), "learning", "router"):
            assert torch.isfinite(outputs(model)(inputs)).all()
        assert router.lesson is None or all(part.error is None or torch.isfinite(part.error) for part in parts.values())
