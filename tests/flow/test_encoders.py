"""Encoders, vision, speech and encoder-decoders: traced, walked block by block, compressed whole."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import artifact
from laconic.calibration import Walk, answer_of
from laconic.core.packed import Held
from laconic.core.site import Embedding, Site
from laconic.data import open_data
from laconic.job import compress, plan
from laconic.models import Source, open_model
from laconic.pipeline import finished_logits
from laconic.recipe import load_recipe

CASES = ("bert", "vit", "clip", "whisper", "t5")
# layers of each stack, in order of execution
STACKS = {"bert": [3], "vit": [3], "clip": [3, 3], "whisper": [2, 2], "t5": [2, 2]}
HERE = Path(__file__).parent


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


groups, encoders = _loaded("groups"), _loaded("encoders")


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's file is on the path; tiny tensors are slower with more threads."""
    monkeypatch.syspath_prepend(str(HERE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("encoders", None)


def opened(case: str) -> Source:
    return open_model(f"encoders:{case}")


def near(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < bound


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return answer_of(model(inputs))


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_is_named_and_stacks_are_found(case: str) -> None:
    source = opened(case)
    anatomy = source.anatomy
    weights = [site.tensors["weight"].name for site in anatomy.sites()]
    assert sorted([*weights, *anatomy.uncovered()]) == sorted(source.infos)
    assert sorted(name for segment in anatomy.segments() for name in segment.tensors) == sorted(source.infos)
    walk = Walk(source, encoders.INPUTS[case](2))
    assert [len(stack) for stack in walk.stacks] == STACKS[case]
    # every matrix is a site; what is left is norms, biases, and what stands in no module of its own
    alone = ("class_embedding", "cls_token", "position_embeddings", "embed_positions.weight")
    for name in anatomy.uncovered():
        assert len(source.infos[name].shape) < 2 or name.endswith(alone)
    # the three projections of one attention see the same input
    first = anatomy.segments()[0].stages[0]
    assert len(first.sites) == 3
    assert anatomy.segments()[0].gives == (3 if case == "t5" else 0)


@pytest.mark.parametrize("case", CASES)
def test_the_walk_gives_the_models_answer(case: str) -> None:
    source = opened(case)
    inputs = encoders.INPUTS[case](5)
    walked = torch.cat(list(finished_logits(source, inputs, 2)))
    assert near(walked, answers(encoders.__dict__[case](), inputs))


def _attention(source: Source) -> Site:
    """The output projection of an attention of the first stack."""
    stages = source.anatomy.segments()[1].stages
    return next(stage for stage in stages if len(stage.sites) == 1).sites[0]


@pytest.mark.parametrize("case", CASES)
def test_masking_a_group_is_removing_it(case: str) -> None:
    source = opened(case)
    anatomy = source.anatomy
    model = encoders.__dict__[case]()
    inputs = encoders.INPUTS[case](4)
    for site, width, gone in ((anatomy.segments()[1].sites[-1], 48, [0, 5, 47]), (_attention(source), 4, [1])):
        group = anatomy.coupled(site, 1)
        assert group.width == width
        assert not group.fixed
        for member in group.members:
            assert anatomy.coupled(member.site, member.axis) == group
        zeroed = groups.masked(model, group, gone)
        small = copy.deepcopy(model)
        for name, value in groups.removed(model, group, gone).items():
            owner, _, leaf = name.rpartition(".")
            own = small.get_submodule(owner)._parameters.get(leaf)
            if own is not None and own.shape != value.shape:
                setattr(small.get_submodule(owner), leaf, nn.Parameter(value))
        if width == 4:
            _fewer_heads(small, site)
        assert near(answers(small, inputs), answers(zeroed, inputs))
        assert not near(answers(model, inputs), answers(zeroed, inputs), 1e-3)


def _fewer_heads(small: nn.Module, site: Site) -> None:
    """The numbers that an attention module keeps beside its weights, for three heads of eight channels."""
    heads = ("num_attention_heads", "num_heads", "n_heads")
    path = site.name
    while path:
        path = path.rpartition(".")[0]
        inner: Any = small.get_submodule(path)
        parts = [part for part in (inner, *inner.children()) if any(isinstance(vars(part).get(name), int) for name in heads)]
        for part in parts:
            for name, value in (*dict.fromkeys(heads, 3).items(), *dict.fromkeys(("all_head_size", "inner_dim", "embed_dim"), 24).items()):
                if isinstance(vars(part).get(name), int):
                    setattr(part, name, value)
        if parts:
            return


# norms before a half or before a cross-attention; the encoder's last where only the decoder's keys and values read it, CLIP's before a
# projection. BERT's go on in the stream, and other last norms are cut to one position first or read by a tied head
FOLDS = {"bert": 0, "vit": 6, "clip": 13, "whisper": 11, "t5": 11}


@pytest.mark.parametrize("case", CASES)
def test_folding_norms_keeps_the_function(case: str) -> None:
    source = opened(case)
    edges = list(source.anatomy.edges())
    assert len(edges) == FOLDS[case]
    model = encoders.__dict__[case]()
    inputs = encoders.INPUTS[case](4)
    before = answers(model, inputs)
    state = model.state_dict()
    for edge in edges:
        assert not edge.allows
        (fold,) = edge.folds
        assert fold.norm.context == {"plus": 0.0, "centred": case != "t5"}
        scale = state[fold.norm.tensors["weight"].name].clone()
        for reader in fold.readers:
            state[reader.site.tensors["weight"].name].mul_(scale)
        if "bias" in fold.norm.tensors:
            state[fold.norm.tensors["bias"].name].div_(scale)
        state[fold.norm.tensors["weight"].name].fill_(1)
    assert near(answers(model, inputs), before)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_job(tmp_path: Path, case: str) -> None:
    source = opened(case)
    split = open_data(f"encoders:{case}_data", source, seed=0, limits=(12, 6, 6))
    made = plan(source, split, load_recipe("gptq"), ["bits=8"], tmp_path / "plan.json", log=lambda _: None)
    settled = [name for choice in made["choices"] for name in choice["covers"]]
    assert sorted([*settled, *(entry["tensor"] for entry in made["kept"])]) == sorted(source.infos)
    assert made["predicted"]["peak_memory_bytes"] < 2_000_000_000
    model = encoders.__dict__[case]()
    inputs = encoders.INPUTS[case](4)
    for recipe in ("rtn", "gptq", "auto") if case in ("clip", "t5") else ("rtn", "gptq"):
        out = tmp_path / recipe
        certificate = compress(source, split, budget=["bits=8"], recipe=load_recipe(recipe), out=out, log=lambda _: None)
        assert certificate["reload"]["difference"] <= 1e-4
        assert artifact.bytes_of(out) == certificate["bytes"] <= source.parameters
        again = artifact.load(out)
        assert near(answers(again, inputs), answers(model, inputs), 0.2)
        forms = json.loads((out / "laconic.json").read_text())["forms"]
        held = {id(layer.weight) for layer in again.modules() if isinstance(layer, Held)}
        assert len(held) == len(forms) == len(settled)


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_a_left_padded_batch_is_one_by_one(tmp_path: Path, case: str) -> None:
    source = opened(case)
    split = open_data(f"encoders:{case}_data", source, seed=0, limits=(12, 6, 6))
    compress(source, split, budget=["bits=8"], recipe=load_recipe("rtn"), out=tmp_path / "out", log=lambda _: None)
    for model in (encoders.__dict__[case](), artifact.load(tmp_path / "out")):
        for row in (encoders.tokens(1)[0, :4], encoders.tokens(2)[1, :7]):
            padded = torch.cat([torch.zeros(10 - len(row), dtype=torch.int64), row])[None]
            mask = (torch.arange(10) >= 10 - len(row)).long()[None]
            with torch.no_grad():
                if case == "bert":
                    places = (mask.cumsum(1) - 1).clamp(min=0)
                    # its pooler looks at the first position, so the states themselves are compared
                    batch = model.bert(padded, attention_mask=mask, position_ids=places).last_hidden_state[:, -len(row) :]
                    alone = model.bert(row[None]).last_hidden_state
                else:
                    batch = model.t5(input_ids=padded, attention_mask=mask, decoder_input_ids=row[None]).logits
                    alone = model.t5(input_ids=row[None], decoder_input_ids=row[None]).logits
            assert near(batch, alone, 2e-5)


def test_a_table_used_four_times_is_stored_once(tmp_path: Path) -> None:
    source = opened("t5")
    table = next(site for site in source.anatomy.sites() if site.roles.get("tied"))
    assert len(table.context["tied"]) == 3
    assert source.parameters == sum(p.numel() for p in encoders.t5().parameters())
    assert sum(table.tensors["weight"].name in segment.tensors for segment in source.anatomy.segments()) == 1
    split = open_data("encoders:t5_data", source, seed=0, limits=(12, 6, 6))
    compress(source, split, budget=["bits=8"], recipe=load_recipe("gptq"), out=tmp_path / "out", log=lambda _: None)
    model = artifact.load(tmp_path / "out")
    assert len({id(model.get_submodule(path).weight) for path in (table.name, *table.context["tied"])}) == 1


def test_convolutions_with_groups(tmp_path: Path) -> None:
    source = opened("separable")
    sites = {site.name: site for site in source.anatomy.sites()}
    assert [int(site.context.get("groups", 1)) for site in sites.values()] == [1, 12, 1, 4, 3, 1]
    model, inputs = encoders.separable(), encoders.pictures(4)
    # a depthwise channel goes with the stem's, a group of a grouped convolution as a whole
    stem = source.anatomy.coupled(sites["stem"], 0)
    assert [(m.site.name, m.axis) for m in stem.members] == [("stem", 0), ("depth", 0), ("point", 1), ("norm", 0)]
    zeroed = groups.masked(model, stem, [2, 7])
    small = copy.deepcopy(model)
    state = groups.removed(model, stem, [2, 7])
    small.stem, small.norm, small.point = nn.Conv2d(3, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 16, 1)
    small.depth = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False)
    small.load_state_dict(state)
    assert near(answers(small.eval(), inputs), answers(zeroed, inputs))
    split = open_data("encoders:separable_data", source, seed=0, limits=(12, 6, 6))
    for recipe in ("rtn", "gptq", "auto"):
        out = tmp_path / recipe
        certificate = compress(source, split, budget=["bits=9"], recipe=load_recipe(recipe), out=out, log=lambda _: None)
        assert certificate["reload"]["difference"] <= 1e-4
        assert near(answers(artifact.load(out), inputs), answers(model, inputs), 0.2)


@pytest.mark.parametrize("case", ["t5", "clip"])
def test_an_interrupted_run_goes_on(tmp_path: Path, case: str) -> None:
    """Also between two stacks, where sites outside the layers were changed."""
    source = opened(case)
    split = open_data(f"encoders:{case}_data", source, seed=0, limits=(12, 6, 6))

    def run(out: str, stop: str = "") -> dict[str, Any]:
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stop and note == stop:
                raise KeyboardInterrupt

        return compress(
            source, split, budget=["bits=8"], recipe=load_recipe("gptq"), out=tmp_path / out, progress=progress, log=lambda _: None
        )

    calm = run("calm")
    layers = [segment.name for segment in source.anatomy.segments() if segment.name]
    for stop in (layers[1], layers[-1], "head and norms"):
        with pytest.raises(KeyboardInterrupt):
            run("out", stop)
    assert run("out")["files"] == calm["files"]


def test_later_layers_see_the_errors_of_earlier_ones(tmp_path: Path) -> None:
    """The codes of a stack's second layer depend on what became of the first: the walk hands on compressed states."""
    source = opened("vit")
    split = open_data("encoders:vit_data", source, seed=0, limits=(12, 6, 6))
    sites = [site for site in source.anatomy.sites() if not isinstance(site.kind, Embedding)]
    second = next(site.name for site in sites if site.name.startswith("vit.layers.1."))
    held = []
    for keep in ("(?!)", r"vit\.(embeddings|layers\.0)\..*"):
        recipe = load_recipe("gptq").model_copy(update={"keep": keep})
        out = tmp_path / str(len(held))
        compress(source, split, budget=["bits=12"] if len(held) else ["bits=4"], recipe=recipe, out=out, log=lambda _: None)
        held.append(artifact.stream(out).read(f"{second}.weight"))
    assert not torch.equal(*held)
