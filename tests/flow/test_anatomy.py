"""Anatomies against the real modules: every stored tensor is named, and a group's slices really fall together."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.anatomy import traced_anatomy
from laconic.core.errors import UserError
from laconic.core.site import Conv, Embedding, Linear, Norm, Paired, Rotate, Scale
from laconic.models import Source, open_model

_spec = importlib.util.spec_from_file_location("groups", Path(__file__).with_name("groups.py"))
assert _spec is not None
assert _spec.loader is not None
groups = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(groups)
masked, removed = groups.masked, groups.removed

DATA = Path(os.environ.get("LACONIC_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def real(name: str) -> Path:
    """A file or folder of the shared data; the test is skipped where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: set LACONIC_DATA to the folder of real data")
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def complete(source: Source) -> None:
    """Site weights and uncovered tensors together are the stored tensors, each once."""
    anatomy = source.anatomy
    weights = [site.tensors["weight"].name for site in anatomy.sites()]
    named = [*weights, *anatomy.uncovered()]
    assert sorted(named) == sorted(source.infos)
    below = [name for segment in anatomy.segments() for name in segment.tensors]
    assert sorted(below) == sorted(source.infos)
    for site in anatomy.sites():
        assert site.shape == source.infos[site.tensors["weight"].name].shape


# ---- residual CNNs


class Block(nn.Module):
    """Two convolutions and a shortcut that subsamples and pads channels with zeros."""

    def __init__(self, into: int, middle: int, out: int, stride: int, pad: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, middle, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al., option A. `widths` of the three stages, `pads` of the two widening shortcuts."""

    def __init__(
        self, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64), pads: tuple[tuple[int, int], ...] = ((8, 8), (16, 16))
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers = []
        into = widths[0]
        for stage, width in enumerate(widths):
            inner = []
            for i in range(blocks):
                wider = stage > 0 and i == 0
                inner.append(Block(into, 16 * 2**stage, width, 2 if wider else 1, pads[stage - 1] if wider else (0, 0)))
                into = width
            layers.append(nn.Sequential(*inner))
        self.layer1, self.layer2, self.layer3 = layers
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def resnet20() -> ResNet:
    from safetensors.torch import load_file

    model = ResNet()
    missing = model.load_state_dict(load_file(real("resnet_cifar10/resnet20.safetensors")), strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_resnet_sites() -> None:
    model = resnet20()
    source = open_model(model)
    with pytest.raises(UserError, match="example_input"):
        _ = source.anatomy
    source.trace(images())
    complete(source)
    anatomy = source.anatomy
    names = [site.name for site in anatomy.sites()]
    assert names[:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    assert names[-1] == "linear"
    assert len(names) == 20
    assert [segment.name for segment in anatomy.segments()] == [""]
    assert all(len(stage.sites) == 1 for stage in anatomy.segments()[0].stages)
    assert len(list(anatomy.sites(Conv))) == 19
    assert source.parameters == 269_722
    assert not list(anatomy.edges())
    first, last = next(anatomy.sites()), [*anatomy.sites()][-1]
    assert first.context["norms"] == ("bn1",)
    assert first.context["fixed"] == (1,)
    assert last.context["fixed"] == (0,)
    assert "linear.bias" in anatomy.uncovered()
    assert "bn1.running_var" in anatomy.uncovered()


def test_resnet_stream_with_padded_shortcuts() -> None:
    model = resnet20()
    anatomy = traced_anatomy(model, images())
    first = next(anatomy.sites())
    group = anatomy.coupled(first, 0)
    norms = [member for member in group.members if isinstance(member.site.kind, Norm)]
    assert group.width == 64
    offsets = {(member.site.name, member.axis): member.index.offset for member in group.members}
    # channel 0 of stage one is channel 8 of stage two and channel 24 of stage three
    assert offsets["conv1", 0] == offsets["layer1.2.conv2", 0] == offsets["layer2.0.conv1", 1] == -24
    assert offsets["layer2.0.conv2", 0] == offsets["layer3.0.conv1", 1] == -16
    assert offsets["layer3.2.conv2", 0] == offsets["linear", 1] == 0
    assert len(group.members) == 1 + 9 + 9 + 1 + len(norms)
    assert {norm.site.name for norm in norms} == {"bn1"} | {f"layer{s}.{b}.bn2" for s in (1, 2, 3) for b in range(3)}
    assert not group.fixed
    for member in group.members:
        assert anatomy.coupled(member.site, member.axis) == group
    x = images()
    gone = [0, 17, 20, 25, 30, 45, 63]
    zeroed = masked(model, group, gone)
    left = [i for i in range(64) if i not in gone]
    widths = tuple(sum(lo <= i < hi for i in left) for lo, hi in ((24, 40), (16, 48), (0, 64)))
    pads = tuple(
        (sum(lo <= i < inner for i in left), sum(top <= i < hi for i in left)) for lo, inner, top, hi in ((16, 24, 40, 48), (0, 16, 48, 64))
    )
    smaller = ResNet(widths=widths, pads=pads).eval()
    smaller.load_state_dict(removed(model, group, gone))
    with torch.no_grad():
        assert torch.allclose(zeroed(x), smaller(x), atol=1e-5)
        assert not torch.allclose(zeroed(x), model(x), atol=1e-2)


def test_resnet_inner_group() -> None:
    model = resnet20()
    anatomy = traced_anatomy(model, images())
    site = next(site for site in anatomy.sites() if site.name == "layer2.1.conv1")
    group = anatomy.coupled(site, 0)
    assert [(m.site.name, m.axis, m.index.offset) for m in group.members] == [
        ("layer2.1.conv1", 0, 0),
        ("layer2.1.conv2", 1, 0),
        ("layer2.1.bn1", 0, 0),
    ]
    assert anatomy.coupled(next(anatomy.sites()), 1).fixed
    assert anatomy.coupled([*anatomy.sites()][-1], 0).fixed
    gone = [1, 5, 31]
    zeroed = masked(model, group, gone)
    smaller = copy.deepcopy(model)
    state = removed(model, group, gone)
    block = smaller.layer2[1]
    block.conv1, block.bn1, block.conv2 = (
        nn.Conv2d(32, 29, 3, 1, 1, bias=False),
        nn.BatchNorm2d(29).eval(),
        nn.Conv2d(29, 32, 3, 1, 1, bias=False),
    )
    smaller.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(zeroed(images()), smaller(images()), atol=1e-5)


def test_trace_leaves_the_module_as_it_was() -> None:
    model = ResNet(blocks=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy = traced_anatomy(model, images())
    anatomy.coupled(next(anatomy.sites()), 0)
    assert all(inner.training for inner in model.modules())
    assert all("forward" not in vars(inner) and not inner._forward_hooks and not inner._forward_pre_hooks for inner in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- other modules


class Odd(nn.Module):
    """Depthwise and 1-D convolutions, concatenation, flattening, a shared module, a dead rectifier and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.a = nn.Conv1d(2, 4, 3, padding=1)
        self.deep = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.b = nn.Conv1d(2, 3, 1)
        self.mix = nn.Conv1d(7, 5, 1)
        self.shared = nn.Linear(5 * 6, 5 * 6)
        self.head = nn.Linear(5 * 6, 2)
        nn.init.constant_(self.deep.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.deep(self.a(x))), self.b(x)], 1)
        y = self.mix(y).flatten(1)
        return self.head(self.shared(self.shared(y)))


def test_odd_module() -> None:
    torch.manual_seed(0)
    model = Odd()
    source = open_model(model)
    source.trace(torch.randn(3, 2, 6))
    complete(source)
    anatomy = source.anatomy
    sites = {site.name: site for site in anatomy.sites()}
    assert list(sites) == ["a", "deep", "b", "mix", "shared", "head"]
    assert {"unused.weight", "unused.bias"} <= set(anatomy.uncovered())
    assert anatomy.coupled(sites["a"], 0) == anatomy.coupled(sites["mix"], 1)
    group = anatomy.coupled(sites["mix"], 1)
    assert group.width == 7
    assert [(m.site.name, m.axis, m.index.offset) for m in group.members] == [("a", 0, 0), ("deep", 0, 0), ("b", 0, -4), ("mix", 1, 0)]
    # a channel of six positions meets six columns after flattening, and the shared square matrix ties them with its rows
    group = anatomy.coupled(sites["mix"], 0)
    assert [(m.site.name, m.axis, m.index.block) for m in group.members] == [
        ("mix", 0, 1),
        ("shared", 0, 6),
        ("shared", 1, 6),
        ("head", 1, 6),
    ]
    assert [*group.members[1].index(4)] == [24, 25, 26, 27, 28, 29]


class Tied(nn.Module):
    """A table that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.head.weight = self.table.weight
        self.example_input = torch.tensor([[1, 2, 3]])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


def test_tied_table_is_one_site() -> None:
    source = open_model(Tied())
    complete(source)
    table, _inner = source.anatomy.sites()
    assert table.name == "table"
    assert isinstance(table.kind, Embedding)
    assert table.roles == {"tied": "head"}
    assert source.parameters == 11 * 8 + 8 * 8 + 8
    # the head makes the table's columns meet both sides of the inner layer
    group = source.anatomy.coupled(table, 1)
    assert [(m.site.name, m.axis) for m in group.members] == [("table", 1), ("inner", 0), ("inner", 1)]
    assert group.width == 8


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.scale


def test_unknown_weights_are_named() -> None:
    source = open_model(Hidden())
    source.trace(torch.randn(2, 4))
    complete(source)
    (site,) = source.anatomy.sites()
    with pytest.raises(UserError, match="scale"):
        source.anatomy.coupled(site, 0)
    source = open_model(nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4)))
    source.trace(torch.tensor([[1, 2]]))
    complete(source)
    with pytest.raises(UserError, match=r"1\.weight_ih_l0"):
        source.anatomy.coupled(next(source.anatomy.sites()), 1)


class ShiftedRMS(nn.Module):
    """A norm that no table knows: RMS with a scale of 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Branches(nn.Module):
    """Two norms: the first is read by two linears only, the second goes on as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ShiftedRMS(6), nn.LayerNorm(5)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(self.a(y) * self.b(y))
        return z + self.c(z)


def test_folds_are_found_where_nothing_else_reads_a_norm() -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(3, 6)
    (edge,) = traced_anatomy(model, x).edges()
    assert edge.folds[0].norm.name == "first"
    assert edge.folds[0].norm.context == {"plus": 1.0, "centred": False}
    assert [reader.site.name for reader in edge.readers] == ["a", "b"]
    with torch.no_grad():
        before = model(x)
        for reader in (model.a, model.b):
            reader.weight.mul_(1 + model.first.weight)
        model.first.weight.zero_()
        assert torch.allclose(model(x), before, atol=1e-5)


def test_module_that_does_not_run() -> None:
    source = open_model(nn.Linear(3, 3))
    with pytest.raises(UserError, match="example input"):
        source.trace(torch.randn(2, 4))


# ---- decoders


def decoder(path: Path, kind: str, **changes: object) -> Source:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(kind, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    return open_model(path)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoder_is_complete(tmp_path: Path, kind: str) -> None:
    source = decoder(tmp_path, kind, **({"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}))
    complete(source)
    anatomy = source.anatomy
    segments = anatomy.segments()
    assert [segment.name for segment in segments] == ["model.layers.0", "model.layers.1", ""]
    assert [[site.roles["part"] for site in stage.sites] for stage in segments[0].stages] == [
        ["q", "k", "v"],
        ["o"],
        ["gate", "up"],
        ["down"],
    ]
    assert [site.name for site in segments[-1].sites] == ["model.embed_tokens", "lm_head"]
    biased = {site.roles["part"] for site in anatomy.sites(Linear) if "bias" in site.tensors}
    assert biased == {"llama": {"q", "k", "v", "o", "gate", "up", "down"}, "qwen2": {"q", "k", "v"}}.get(kind, set())
    assert ("model.layers.0.self_attn.q_norm.weight" in anatomy.uncovered()) == (kind == "qwen3")
    q = segments[0].sites[0]
    assert {"heads": 4, "kv_heads": 2, "head_dim": 8}.items() <= q.context.items()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("part", "axis", "gone"), [("gate", 0, [0, 7, 79]), ("v", 0, [1]), ("o", 1, [0])])
def test_decoder_removal_equals_masking(tmp_path: Path, kind: str, part: str, axis: int, gone: list[int]) -> None:
    source = decoder(tmp_path, kind)
    anatomy = source.anatomy
    site = next(site for site in anatomy.segments()[1].sites if site.roles["part"] == part)
    group = anatomy.coupled(site, axis)
    assert group.width == (80 if part == "gate" else 2)
    assert all(anatomy.coupled(m.site, m.axis) == group for m in group.members)
    model = source.load(torch.float32)
    zeroed = masked(model, group, gone)
    smaller = copy.deepcopy(model)
    for name, value in removed(model, group, gone).items():
        owner, _, leaf = name.rpartition(".")
        setattr(smaller.get_submodule(owner), leaf, nn.Parameter(value))
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(zeroed(ids).logits, smaller(ids).logits, atol=1e-4)
        assert not torch.allclose(zeroed(ids).logits, model(ids).logits, atol=1e-2)


def test_decoder_streams(tmp_path: Path) -> None:
    source = decoder(tmp_path, "llama", tie_word_embeddings=True)
    anatomy = source.anatomy
    embed = next(iter(anatomy.sites(Embedding)))
    assert embed.roles["tied"] == "lm_head"
    assert len(anatomy.segments()[-1].sites) == 1
    group = anatomy.coupled(embed, 1)
    assert group.width == 64
    assert len(group.members) == 1 + 2 * 7 + 5
    assert all(anatomy.coupled(m.site, m.axis) == group for m in group.members)
    assert anatomy.coupled(embed, 0).width == 96
    stream, *others = anatomy.edges()
    assert [edge.name for edge in others][:3] == ["model.layers.0.value", "model.layers.0.keys", "model.layers.0.gate"]
    # then what each norm gives; a tied head reads the last one and writes the stream
    assert [edge.name.rpartition(".")[2] for edge in others][6:] == ["input_layernorm", "post_attention_layernorm"] * 2
    assert [len(edge.readers) for edge in others][6:] == [3, 2, 3, 2]
    assert all(edge.allows == (Scale(),) and edge.block == edge.width == 64 for edge in others[6:])
    assert len(stream.writers) == 1 + 2 * 2
    assert len(stream.readers) == 2 * 5 + 1
    assert len(stream.folds) == 5
    # the last norm is read by a table that is also written to the stream, so nothing may turn
    assert [len(fold.readers) for fold in stream.folds] == [3, 2, 3, 2, 0]
    assert stream.may(Rotate) is None
    assert others[2].allows == (Scale(),)
    # all of a head's channels are turned, in pairs
    assert others[1].allows == (Paired(4),) and others[1].block == 8
    assert others[0].may(Rotate) == Rotate()
    assert others[0].block == 8
    assert stream.width == 64


def test_residual_width_removal(tmp_path: Path) -> None:
    """Channels of the residual stream that nothing writes may go; a norm then counts fewer."""
    source = decoder(tmp_path, "llama", tie_word_embeddings=True)
    anatomy = source.anatomy
    group = anatomy.coupled(next(iter(anatomy.sites(Embedding))), 1)
    gone = list(range(0, 64, 4))
    model = source.load(torch.float32)
    zeroed = masked(model, group, gone)
    smaller = copy.deepcopy(model)
    kept = [i for i in range(64) if i not in gone]
    with torch.no_grad():
        # the mean of squares is now over fewer channels: the scale takes the difference
        for name, value in removed(model, group, gone).items():
            owner, _, leaf = name.rpartition(".")
            if "norm" in name:
                value = value * (64 / len(kept)) ** 0.5
            setattr(smaller.get_submodule(owner), leaf, nn.Parameter(value))
        smaller.lm_head.weight = smaller.model.embed_tokens.weight
        ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
        assert torch.allclose(zeroed(ids).logits, smaller(ids).logits, atol=1e-3)


def test_stories260k() -> None:
    source = open_model(real("stories260k"))
    complete(source)
    assert source.parameters == 260_032
    assert len(list(source.anatomy.sites(Linear))) == 35
    assert len(source.anatomy.uncovered()) == 11
    assert source.anatomy.segments()[-1].tensors == ("model.embed_tokens.weight", "model.norm.weight")
