"""A written folder comes back: whole, piece by piece, through transformers, and refused in one sentence when it is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from laconic import artifact
from laconic.core.errors import UserError
from laconic.core.packed import Dense, Held, Packed, Product, Sum
from laconic.journal import Work
from laconic.kernels.levels import Levels, encode, fit_scale, fit_table, whole_of
from laconic.methods.quantize.grid.levels import Leveled
from laconic.models import open_model

TOKENS = torch.tensor([[1, 5, 9, 2, 77, 3], [4, 4, 60, 8, 0, 12]])


def original(folder: Path, *, tied: bool, bias: bool = True) -> Path:
    """A random Llama of two layers in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def form_of(name: str, weight: Tensor) -> Packed | None:
    """Some of every form: a sum of a base and a low rank for the MLP, the numbers themselves for the queries, 4-bit floats and a codebook
    for outputs and values, a sum of one for the rest, none for the keys and all vectors."""
    if weight.dim() < 2 or "k_proj" in name:
        return None
    if "q_proj" in name:
        return Dense(weight)
    if "o_proj" in name or "v_proj" in name:
        levels = Levels.nvfp4() if "o_proj" in name else Levels.codebook(3, 16)
        whole = whole_of(weight.abs().max(), levels)
        scale = fit_scale(weight.float(), levels, whole)
        table = fit_table(weight, scale, levels) if levels.table == "codebook" else None
        return Leveled.of(tuple(weight.shape), levels, encode(weight.float(), scale, levels, table), scale, whole, table)
    if "mlp" not in name:
        return Sum(Dense(weight))
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    return Sum(Dense((weight.float() * 0.5).bfloat16()), Product(Dense((u[:, :4] * s[:4]).T.contiguous()), Dense(v[:4])))


def written(out: Path, source: Any, manifest: Any = None) -> tuple[Path, dict[str, Tensor]]:
    """Every tensor of the source in its form, written; -> OUT and what each tensor now stands for."""
    forms: dict[str, Any] = {}
    dense: dict[str, Tensor] = {}
    parts: list[dict[str, Tensor]] = [{}, {}]
    for number, name in enumerate(source.infos):
        weight = source.read(name)
        form = form_of(name, weight)
        if form is None:
            parts[number % 2][name] = weight
            dense[name] = weight.float()
        else:
            forms[name] = form.describe()
            parts[number % 2] |= {f"{name}.{key}": t for key, t in form.tensors().items()}
            dense[name] = form.dense()
    with Work(out, {"seed": 0}) as work:
        for number, part in enumerate(parts):
            work.finish(str(number), {}, part)
        files = manifest(forms) if manifest else {"config.json": artifact.config_with(source.path / "config.json", forms)}
        hashes = work.assemble(files, ["0", "1"], shard_bytes=20_000)
        work.publish({"certificate.json": json.dumps({"files": hashes}).encode()})
    return out, dense


def reference(source: Any, dense: dict[str, Tensor]) -> Tensor:
    """Logits of the original with every tensor replaced by what its form stands for."""
    model = source.load(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[source.tied.get(name, name)])
        return model(TOKENS).logits


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    source = open_model(original(tmp_path / "model", tied=request.param))
    out, dense = written(tmp_path / "out", source)
    return out, source, dense


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_load(case: tuple[Path, Any, dict[str, Tensor]]) -> None:
    out, source, dense = case
    expected = reference(source, dense)
    model = artifact.load(out)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.lm_head, Held)
    assert isinstance(model.model.layers[1].mlp.up_proj.weight, Sum)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(source.tied)
    # held by no form, and held as they are
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    thawed = artifact.load(out, thaw=True)
    torch.testing.assert_close(logits(thawed), expected, rtol=1e-5, atol=1e-5)
    half = artifact.load(out, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.weight.terms[1].left.value.dtype == torch.float32


def test_stream_is_a_source(case: tuple[Path, Any, dict[str, Tensor]]) -> None:
    out, source, dense = case
    opened = artifact.stream(out)
    assert set(opened.infos) == set(source.infos)
    assert opened.tied == source.tied
    assert opened.parameters == source.parameters
    assert [s.name for s in opened.anatomy.segments()] == [s.name for s in source.anatomy.segments()]
    for name, expected in dense.items():
        assert opened.infos[name].shape == source.infos[name].shape
        assert torch.equal(opened.read(name).float(), expected)
        torch.testing.assert_close(opened.read_rows(name, 3, 5).float(), expected[3:5], rtol=1e-5, atol=1e-6)
    model = opened.skeleton()
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model.model.layers[0].mlp.up_proj, Held)
    block = model.model.layers[1]
    opened.fill(block, "model.layers.1", torch.float32)
    assert not any(t.is_meta for t in [*block.parameters(), *block.buffers()])
    assert all(p.is_meta for p in model.model.layers[0].parameters())
    weight = block.mlp.down_proj.weight
    assert torch.equal(weight.dense(), dense["model.layers.1.mlp.down_proj.weight"])
    # released and filled again, as a walk does
    for inner in block.modules():
        for key, buffer in inner.named_buffers(recurse=False):
            inner.register_buffer(key, buffer.to("meta"))
    opened.fill(block, "model.layers.1", torch.float32)
    assert torch.equal(block.mlp.down_proj.weight.dense(), dense["model.layers.1.mlp.down_proj.weight"])
    # a head alone
    opened.fill(model.lm_head, "lm_head", torch.float32)
    head = source.tied.get("lm_head.weight", "lm_head.weight")
    assert torch.equal(model.lm_head.weight.dense(), dense[head])


def test_rows_cost_what_they_are(case: tuple[Path, Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run after run of a table: of one that no form holds the rows alone are read, a form is read once."""
    out, _, dense = case
    opened, read = artifact.stream(out), []
    stored = artifact.read_stored

    def counted(*args: Any) -> Tensor:
        read.append((found := stored(*args)).nbytes)
        return found

    monkeypatch.setattr(artifact, "read_stored", counted)
    plain, held = "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"
    for name in (plain, held):
        read.clear()
        for start in (0, 4, 9):
            torch.testing.assert_close(opened.read_rows(name, start, start + 2).float(), dense[name][start : start + 2])
        assert sum(read) == (3 * 2 * 32 * 2 if name == plain else 96 * 32 * 2)


def test_walk_through_an_artifact(case: tuple[Path, Any, dict[str, Tensor]]) -> None:
    calibration = pytest.importorskip("laconic.calibration")
    out, source, dense = case
    walk = calibration.Walk(artifact.stream(out), TOKENS, batch=2)
    walk.begin()
    for segment in walk.layers:
        module = walk.take(segment)
        walk.advance(module, segment)
        calibration.release(module)
    torch.testing.assert_close(next(iter(walk.logits())), reference(source, dense), rtol=1e-4, atol=1e-5)


def test_bytes(case: tuple[Path, Any, dict[str, Tensor]]) -> None:
    out, source, _ = case
    files = list(out.glob("*.safetensors"))
    assert artifact.file_bytes_of(out) == sum(f.stat().st_size for f in files)
    assert len(files) > 1
    forms = [form_of(name, source.read(name)) or Dense(source.read(name)) for name in source.infos]
    assert artifact.bytes_of(out) == sum(form.nbytes for form in forms)


PLUGIN = textwrap.dedent("""
    import sys
    import laconic.plugin
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    laconic.plugin.on_import()
    laconic.plugin.on_import()
    import logging, warnings
    warnings.simplefilter("error")
    import torch
    from transformers import AutoModelForCausalLM, logging as speech
    said = []
    handler = logging.Handler(); handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    import laconic.artifact as artifact
    from laconic.core.packed import Held
    tokens = torch.tensor([[1, 5, 9, 2, 77, 3], [4, 4, 60, 8, 0, 12]])
    for out in sys.argv[1:]:
        again = out + "-again"
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert not said, said
        assert not [f for f in sys.meta_path if type(f).__module__ == "laconic.plugin"]
        own = artifact.load(out)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, own(tokens).logits)
            how = dict(attention_mask=torch.ones_like(tokens), pad_token_id=0, max_new_tokens=3, do_sample=False)
            assert torch.equal(model.generate(tokens, **how), own.generate(tokens, **how))
            half = AutoModelForCausalLM.from_pretrained(out)
            assert half.dtype == torch.bfloat16
            assert torch.equal(half(tokens).logits, artifact.load(out, dtype=torch.bfloat16)(tokens).logits)
            model.save_pretrained(again)
            saved = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
            assert isinstance(saved.lm_head, Held)
            assert torch.equal(saved(tokens).logits, own(tokens).logits)
            assert torch.equal(artifact.load(again)(tokens).logits, own(tokens).logits)
        assert set(artifact.stream(again).stored) == set(artifact.stream(out).stored)
        assert not said, said
""")


def test_transformers_reads_it(tmp_path: Path) -> None:
    outs = []
    for tied in (True, False):
        source = open_model(original(tmp_path / f"model-{tied}", tied=tied))
        outs.append(str(written(tmp_path / f"out-{tied}", source)[0]))
    ended = subprocess.run([sys.executable, "-c", PLUGIN, *outs], capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_transformers_imported_first(tmp_path: Path) -> None:
    # this process has transformers already
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from laconic import plugin

    plugin.on_import()
    plugin.register()
    assert "laconic" in AUTO_QUANTIZATION_CONFIG_MAPPING


def test_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_net.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        def make():
            torch.manual_seed(1)
            return nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect"), nn.Flatten(), nn.Linear(8 * 16, 5),
            ).eval()
        """)
    )
    monkeypatch.chdir(tmp_path)
    source = open_model("small_net:make")
    out, _ = written(tmp_path / "out", source, lambda forms: {"laconic.json": artifact.manifest_with("small_net:make", forms)})
    x = torch.randn(2, 3, 8, 8)
    model = artifact.load(out)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source.load(torch.float32)(x), rtol=1e-5, atol=1e-5)
    # Held does not know reflected borders, so that layer stays one of torch's
    assert isinstance(model[0], Held)
    assert type(model[3]) is nn.Conv2d
    assert isinstance(model[5], Held)
    with torch.no_grad():
        torch.testing.assert_close(artifact.load_any(out)(x), artifact.load_any("small_net:make")(x), rtol=1e-5, atol=1e-5)


def edited(out: Path, change: Any) -> None:
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))


def drop_tensor(out: Path) -> None:
    for file in [*out.glob("*.safetensors"), out / "model.safetensors.index.json"]:
        file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.gone.weight"'))


DAMAGE = {
    "missing shard": (lambda out: next(out.glob("*-00002-*.safetensors")).unlink(), "lacks model-00002"),
    "cut off": (lambda out: next(out.glob("*-00001-*.safetensors")).write_bytes(b"\x00" * 100), "truncated or damaged"),
    "unknown form": (lambda out: edited(out, lambda c: c["forms"]["lm_head.weight"].update(form="quantize.grid.later.Form")), "update"),
    "missing key": (lambda out: edited(out, lambda c: c["forms"].update({"model.norm.weight": {"form": "core.packed.Dense"}})), "again"),
    "later format": (lambda out: edited(out, lambda c: c.update(format=9)), "format 9"),
    "no forms": (lambda out: edited(out, lambda c: c.pop("forms")), "does not say how"),
    "missing tensor": (drop_tensor, "lacks the tensor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, damage: str) -> None:
    source = open_model(original(tmp_path / "model", tied=False))
    out, _ = written(tmp_path / "out", source)
    spoil, message = DAMAGE[damage]
    spoil(out)
    with pytest.raises(UserError, match=message) as caught:
        artifact.load(out)
    assert "\n" not in str(caught.value)


def test_hashes_are_compared(tmp_path: Path) -> None:
    source = open_model(original(tmp_path / "model", tied=True))
    out, _ = written(tmp_path / "out", source)
    assert len(artifact.verify_hashes(out)) > 2
    file = next(out.glob("*-00002-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{file.name} is not what was written"):
        artifact.verify_hashes(out)
    file.unlink()
    with pytest.raises(UserError, match=f"lacks {file.name}"):
        artifact.verify_hashes(out)
    with pytest.raises(UserError, match="not written by laconic"):
        artifact.load(tmp_path / "model")
    with pytest.raises(UserError, match="no such folder"):
        artifact.load(tmp_path / "nowhere")


def test_inputs_are_rounded_where_a_form_has_such_a_product() -> None:
    from transformers.pytorch_utils import Conv1D

    from laconic.core.packed import Scaled, Transposed
    from laconic.kernels.grids import Grid, encode, fit_range
    from laconic.kernels.linear import reference_linear_int8
    from laconic.methods.quantize.grid.grouped import Grouped
    from laconic.methods.quantize.rotate.hadamard import Rotated

    grid, layer = Grid(4, 16), nn.Linear(32, 8, bias=False)

    def form(*shape: int) -> Grouped:
        weight = torch.randn(shape[0], 32)
        scale, zero = fit_range(weight, grid)
        return Grouped.of(shape, grid, encode(weight, scale, zero, grid), scale, zero)

    low = Product(Dense(torch.randn(2, 8)), form(2, 32))
    held = {
        "grouped": Held(form(8, 32), layer, None),
        "sum": Held(Sum(form(8, 32), low), layer, None),
        "turned": Held(Rotated(form(8, 32)), layer, None),
        "across": Held(Transposed(form(8, 32)), Conv1D(8, 32), None),
        "table": Held(form(8, 32), nn.Embedding(8, 32), None),
        "plain": Held(Sum(Dense(torch.randn(8, 32))), layer, None),
        "scaled": Held(Scaled(form(8, 32), torch.ones(32)), layer, None),
        "conv": Held(form(8, 2, 4, 4), nn.Conv2d(2, 8, 4), None),
    }
    model, x, image = nn.ModuleDict(held), torch.randn(3, 32), torch.randn(1, 2, 4, 4)
    given = {name: image if name == "conv" else torch.tensor([1]) if name == "table" else x for name in held}
    before = {name: one(given[name]) for name, one in held.items()}
    said = artifact.round_inputs(model, 8)
    assert said == "4 of 7 held layers round their inputs to 8 bits; 3 are held in forms without such a product and take inputs as they are"
    for name, one in held.items():
        assert torch.equal(one(given[name]), before[name]) == (name in ("table", "plain", "scaled", "conv")), name
        torch.testing.assert_close(one(given[name]), before[name], rtol=0.1, atol=0.5)
    only: Any = held["grouped"].weight
    torch.testing.assert_close(held["grouped"](x), reference_linear_int8(x, only.codes, only.scales, only.zeros, grid))
    with pytest.raises(UserError, match="no matrix of this model is held in grouped codes"):
        artifact.round_inputs(nn.ModuleDict({"plain": held["plain"]}), 8)
