"""Every architecture with a row, on a tiny random model of transformers' own class: groups fall together, edges keep the function, padding
changes nothing, and the whole job runs on it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from laconic import artifact
from laconic.architectures import DECODERS
from laconic.core.site import Edge, Group, Member, Norm, Rotate, Scale
from laconic.data import open_data
from laconic.job import compress, plan
from laconic.models import Source, open_model
from laconic.pipeline import finished_logits
from laconic.recipe import load_recipe

_spec = importlib.util.spec_from_file_location("groups", Path(__file__).with_name("groups.py"))
assert _spec is not None
assert _spec.loader is not None
groups = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(groups)
masked, removed = groups.masked, groups.removed

LAYERS = 2
BASE: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# what a case changes, by architecture; a case is named architecture or architecture-something
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma-untied": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16},
    "gemma2-untied": {"tie_word_embeddings": False, "sliding_window": 16},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"qk_layernorm": False},
    "phi3": {"tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": True},
    "gpt2-untied": {"tie_word_embeddings": False},
    "gpt_neox": {"use_parallel_residual": True, "tie_word_embeddings": False},
    "gpt_neox-serial": {"use_parallel_residual": False, "tie_word_embeddings": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "opt-untied": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    "opt-projected": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "tie_word_embeddings": True},
}
# query heads share KV heads
GROUPED = {"llama", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral", "qwen3_moe"}
ROTATES = {"llama", "gemma-untied", "phi", "phi3", "gpt2-untied", "gpt_neox", "gpt_neox-serial", "opt-untied"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(path: Path, case: str, vocabulary: int = 96) -> Source:
    """A random model of the case, saved as transformers saves it; norms have scales and shifts that are not trivial."""
    torch.manual_seed(0)
    kind = case.split("-")[0]
    shared = {"num_key_value_heads": 2, "head_dim": 8} if kind in GROUPED else {}
    config = AutoConfig.for_model(kind, **({**BASE, **shared, "vocab_size": vocabulary} | CASES[case]))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.copy_(0.6 + torch.rand(parameter.shape) - DECODERS[config.model_type].plus)
    model.save_pretrained(path)
    return open_model(path)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """Each case's model, made once."""
    made: dict[str, Source] = {}

    def get(case: str) -> Source:
        if case not in made:
            made[case] = make(tmp_path_factory.mktemp(case), case)
        return made[case]

    return get


def ids(count: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def parameters(source: Source, model: nn.Module) -> dict[str, Tensor]:
    """Stored name -> the module's own tensor."""
    return {source.tied.get(name, name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def near(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < bound


# ---- names


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_is_named_once(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    stored = {site.tensors["weight"].name for site in source.anatomy.sites()}
    named = [*stored, *source.anatomy.uncovered()]
    assert sorted(named) == sorted(source.infos)
    below = [name for segment in source.anatomy.segments() for name in segment.tensors]
    assert sorted(below) == sorted(source.infos)
    for site in source.anatomy.sites():
        shape = source.infos[site.tensors["weight"].name].shape
        assert site.shape == (shape[::-1] if site.transposed else shape)
    # what no site covers is small: norms, biases, positions, routers, and the projections of an embedding with a width of its own
    for name in source.anatomy.uncovered():
        assert len(source.infos[name].shape) == 1 or any(word in name for word in ("wpe", "embed_positions", "project_", "mlp.gate."))
    assert source.parameters == sum(p.numel() for p in source.load(torch.float32).parameters())


# ---- groups


def shrunk(source: Source, model: nn.Module, group: Group, gone: list[int]) -> nn.Module:
    """The model without the slices of a group: parameters replaced, and the numbers that its attention keeps beside them."""
    smaller = copy.deepcopy(model)
    names = {stored: name for name, stored in ((n, source.tied.get(n, n)) for n in model.state_dict())}
    for stored, value in removed(model, group, gone).items():
        owner, _, leaf = names.get(stored, stored).rpartition(".")
        own = smaller.get_submodule(owner)._parameters.get(leaf)
        if own is not None and own.shape != value.shape:
            setattr(smaller.get_submodule(owner), leaf, nn.Parameter(value))
    for module in smaller.modules():
        if type(module).__name__ == "Conv1D":
            module.nx, module.nf = module.weight.shape
    if "o" in {member.site.roles["part"] for member in group.members}:
        path = next(member.site.name for member in group.members if member.site.roles["part"] == "o").rpartition(".")[0]
        attention = smaller.get_submodule(path)
        context = next(m.site.context for m in group.members if m.site.roles["part"] == "o")
        left = group.width - len(gone)
        heads = left * (context["heads"] // context["kv_heads"])
        config = copy.deepcopy(attention.config)
        config.num_attention_heads, attention.config = heads, config
        for name, value in (
            ("num_heads", heads),
            ("num_key_value_heads", left),
            ("embed_dim", heads * context["head_dim"]),
            ("split_size", heads * context["head_dim"]),
        ):
            if hasattr(attention, name):
                setattr(attention, name, value)
    return smaller


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_masking_a_group_is_removing_it(opened: Callable[[str], Source], case: str, half: str) -> None:
    source = opened(case)
    anatomy = source.anatomy
    site = next(s for s in anatomy.segments()[1].sites if s.roles["part"] == ("o" if half == "attention" else "down"))
    group = anatomy.coupled(site, 1)
    assert not group.fixed
    for member in group.members:
        assert anatomy.coupled(member.site, member.axis) == group
    gone = [0] if half == "attention" else [0, 5, group.width - 1]
    model = source.load(torch.float32)
    zeroed = masked(model, group, gone)
    small = shrunk(source, model, group, gone)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert near(logits(small, ids()), logits(zeroed, ids()))
    assert not near(logits(model, ids()), logits(zeroed, ids()), 1e-3)


def permuted(source: Source, model: nn.Module, group: Group, order: Tensor) -> nn.Module:
    """The model with the canonical indices of a group in another order."""
    new = copy.deepcopy(model)
    own = parameters(source, new)
    for member in group.members:
        taken = torch.tensor([j for i in order.tolist() for j in member.index(i)])
        at = torch.tensor([j for i in range(group.width) for j in member.index(i)])
        for role, tensor in member.site.tensors.items():
            value = own[tensor.name].data
            axis = member.stored_axis if role == "weight" else 0
            if role == "weight" or member.axis == 0:
                value.index_copy_(axis, at, value.index_select(axis, taken).clone())
    return new


@pytest.mark.parametrize("case", CASES)
def test_channels_of_the_stream_may_change_places(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    anatomy = source.anatomy
    site = next(s for s in anatomy.segments()[0].sites if s.roles["part"] == "o")
    group = anatomy.coupled(site, 0)
    assert group.width == 32
    for member in group.members:
        assert anatomy.coupled(member.site, member.axis) == group
    norms = [member for member in group.members if isinstance(member.site.kind, Norm)]
    assert len(norms) >= LAYERS
    model = source.load(torch.float32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    moved = permuted(source, model, group, order)
    assert near(logits(moved, ids()), logits(model, ids()))
    # one member left out is enough to break it
    if len(group.members) > 1:
        broken = permuted(source, model, group._replace(members=group.members[1:]), order)
        assert not near(logits(broken, ids()), logits(model, ids()), 1e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_vocabulary_and_positions_stay(opened: Callable[[str], Source], case: str) -> None:
    anatomy = opened(case).anatomy
    for site in anatomy.tail:
        assert anatomy.coupled(site, 0).fixed
    for site in anatomy.named.values():  # type: ignore[attr-defined]
        if site.roles["part"] == "positions":
            assert anatomy.coupled(site, 0).fixed


# ---- edges


def turn(value: Tensor, axis: int, matrix: Tensor, index: list[list[int]]) -> None:
    """x -> x Q along one axis in place: each of `index` lists the entries, in order, that one copy of the stream's channels has."""
    for entries in index:
        at = torch.tensor(entries)
        part = value.index_select(axis, at).movedim(axis, -1).double() @ matrix.double()
        value.index_copy_(axis, at, part.to(value.dtype).movedim(-1, axis).contiguous())


def copies(member: Member, width: int) -> list[list[int]]:
    """The copies of the stream that a member has: more than one where an entry of v feeds several query heads."""
    table = [list(member.index(i)) for i in range(width)]
    return [[entries[c] for entries in table] for c in range(len(table[0]))]


def fold(source: Source, model: nn.Module, edge: Edge) -> None:
    """Every norm's scale into its readers; its shift then stands before them unscaled."""
    own = parameters(source, model)
    for entry in edge.folds:
        if not entry.readers:
            continue
        tensors = entry.norm.tensors
        scale = own[tensors["weight"].name].data + entry.norm.context["plus"]
        for reader in entry.readers:
            weight = own[reader.site.tensors["weight"].name].data
            shape = [1] * weight.dim()
            shape[reader.stored_axis] = -1
            weight.mul_(scale.reshape(shape))
        if "bias" in tensors:
            own[tensors["bias"].name].data.div_(scale)
        own[tensors["weight"].name].data.fill_(1 - entry.norm.context["plus"])


def rotate(source: Source, model: nn.Module, edge: Edge, matrix: Tensor) -> None:
    own = parameters(source, model)
    whole = torch.block_diag(*[matrix] * (edge.width // edge.block))
    for member in (*edge.writers, *edge.readers):
        turn(own[member.site.tensors["weight"].name].data, member.stored_axis, whole, copies(member, edge.width))
    for member in edge.writers:
        if member.axis == 0 and "bias" in member.site.tensors:
            turn(own[member.site.tensors["bias"].name].data, 0, whole, copies(member, edge.width))
    for entry in edge.folds:
        if "bias" in entry.norm.tensors:
            turn(own[entry.norm.tensors["bias"].name].data, 0, whole, [list(range(edge.width))])


def orthogonal(width: int, keeps_ones: bool) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    found = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    if not keeps_ones:
        return found
    # the first basis vector is the vector of ones; the rest turns among itself
    basis = torch.randn(width, width, dtype=torch.float64, generator=generator)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis)[0]
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:] = torch.linalg.qr(torch.randn(width - 1, width - 1, dtype=torch.float64, generator=generator))[0]
    return basis @ inner @ basis.T


def residual(source: Source) -> Edge:
    return next(iter(source.anatomy.edges()))


@pytest.mark.parametrize("case", CASES)
def test_folding_norms_keeps_the_function(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    model = source.load(torch.float32)
    folded = copy.deepcopy(model)
    edge = residual(source)
    assert any(entry.readers for entry in edge.folds) != (case == "opt-projected")
    fold(source, folded, edge)
    assert near(logits(folded, ids()), logits(model, ids()))


@pytest.mark.parametrize("case", CASES)
def test_rotating_the_stream_is_exact_where_allowed(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    edge = residual(source)
    model = source.load(torch.float32)
    allowed = edge.may(Rotate)
    assert (allowed is not None) == (case in ROTATES)
    turned = copy.deepcopy(model)
    fold(source, turned, edge)
    rotate(source, turned, edge, orthogonal(edge.width, keeps_ones=True))
    # where it is not allowed it is not exact either
    assert near(logits(turned, ids()), logits(model, ids()), 1e-4) == (allowed is not None)
    if allowed is not None:
        free = copy.deepcopy(model)
        fold(source, free, edge)
        rotate(source, free, edge, orthogonal(edge.width, keeps_ones=False))
        assert near(logits(free, ids()), logits(model, ids()), 1e-4) == (not allowed.keeps_ones)


@pytest.mark.parametrize("case", CASES)
def test_inner_edges_are_exact(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    model = source.load(torch.float32)
    before = logits(model, ids())
    own = parameters(source, model)
    generator = torch.Generator().manual_seed(5)
    kinds = set()
    for edge in source.anatomy.edges():
        if edge.name == "residual":
            continue
        kind = edge.name.rpartition(".")[2]
        kinds.add(kind)
        if edge.may(Rotate) is not None:
            rotate(source, model, edge, orthogonal(edge.block, keeps_ones=False))
        if (scale := edge.may(Scale)) is not None:
            factors = 0.5 + torch.rand(edge.width, generator=generator)
            if not scale.positive:
                factors *= torch.where(torch.rand(edge.width, generator=generator) < 0.5, -1.0, 1.0)
            for members, values in ((edge.writers, factors), (edge.readers, 1 / factors)):
                for member in members:
                    _scale(own, member, values)
        else:
            assert case.split("-")[0] in ("phi", "gpt2", "gpt_neox")
    assert kinds == {"value", "gate"}
    assert near(logits(model, ids()), before, 2e-5)


def _scale(own: Mapping[str, Tensor], member: Member, values: Tensor) -> None:
    for i, factor in enumerate(values.tolist()):
        at = list(member.index(i))
        for role, tensor in member.site.tensors.items():
            if role == "weight":
                own[tensor.name].data.movedim(member.stored_axis, 0)[at] *= factor
            elif member.axis == 0:
                own[tensor.name].data[at] *= factor


# ---- the walk and the job


@pytest.mark.parametrize("case", CASES)
def test_the_walk_gives_the_models_logits(opened: Callable[[str], Source], case: str) -> None:
    source = opened(case)
    tokens = ids(3, 20)
    walked = torch.cat(list(finished_logits(source, tokens, 2)))
    assert near(walked, logits(source.load(torch.float32), tokens))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from laconic.zoo import corpus

    path = tmp_path_factory.mktemp("text") / "text.txt"
    blocks = "\n\n".join(text for _, text in corpus.named("search")).split("\n\n")
    path.write_text("\n\n".join(blocks[:120]), encoding="utf-8")
    return path


def with_tokenizer(folder: Path, case: str) -> Source:
    from laconic.zoo import nano

    make(folder, case, vocabulary=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((nano.path() / name).read_bytes())
    return open_model(folder)


def left_padded(model: nn.Module) -> None:
    """A batch of sequences of unlike length, padded on the left, gives each sequence what it gives alone."""
    generator = torch.Generator().manual_seed(6)
    lengths = (12, 7, 3)
    rows = [torch.randint(3, 96, (length,), generator=generator) for length in lengths]
    tokens = torch.stack([torch.cat([torch.zeros(12 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    batch = logits(model, tokens, attention_mask=mask, **more)
    for i, row in enumerate(rows):
        alone = logits(model, row[None])
        assert near(batch[i, 12 - len(row) :], alone[0], 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_job(tmp_path: Path, text: Path, case: str) -> None:
    source = with_tokenizer(tmp_path / "model", case)
    split = open_data(str(text), source, seed=0, length=24, limits=(4, 2, 2))
    names = set(source.infos)
    made = plan(source, split, load_recipe("gptq"), ["bits=7"], tmp_path / "plan.json", log=lambda _: None)
    settled = [name for choice in made["choices"] for name in choice["covers"]]
    assert sorted([*settled, *(entry["tensor"] for entry in made["kept"])]) == sorted(names)
    assert all(entry["why"] for entry in made["kept"])
    tokens = torch.randint(3, 4096, (2, 20), generator=torch.Generator().manual_seed(7))
    original = logits(source.load(torch.float32), tokens)
    for recipe in ("rtn", "gptq"):
        out = tmp_path / recipe
        certificate = compress(source, split, budget=["bits=7"], recipe=load_recipe(recipe), out=out, log=lambda _: None)
        assert certificate["reload"]["difference"] <= 1e-4
        assert artifact.bytes_of(out) == certificate["bytes"] <= 7 * source.parameters / 8
        model = artifact.load(out)
        ours = logits(model, tokens)
        assert torch.isfinite(ours).all()
        assert near(ours, original, 0.2)
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert near(logits(theirs, tokens), ours)
        # every form is held in the loaded model: nothing was made dense on the way
        from laconic.core.packed import Held

        held = {id(layer.weight) for layer in model.modules() if isinstance(layer, Held)}
        forms = json.loads((out / "config.json").read_text())["quantization_config"]["forms"]
        assert len(held) == len(forms) == len(settled)
    left_padded(model)
    left_padded(source.load(torch.float32))


def test_auto_prices_a_transposed_fused_matrix(tmp_path: Path, text: Path) -> None:
    source = with_tokenizer(tmp_path / "model", "gpt2")
    split = open_data(str(text), source, seed=0, length=24, limits=(4, 2, 2))
    compress(source, split, budget=["bits=5"], recipe=load_recipe("auto"), out=tmp_path / "out", log=lambda _: None)
    made = json.loads((tmp_path / "out" / "plan.json").read_text())
    priced = [row for row in made["menu"] if row["site"].endswith("c_attn")]
    assert priced
    assert all(row["damage"]["value"] >= 0 for row in priced)
