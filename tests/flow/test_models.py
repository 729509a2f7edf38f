"""Opening models: every tensor exactly as stored, little memory, and one sentence for all that is wrong with one."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laconic.core.errors import UserError
from laconic.models import Source, header, is_artifact, open_model

DATA = Path(os.environ.get("LACONIC_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(path: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: object) -> Path:
    """A tiny random decoder as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(kind, **(sizes | changes))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def original(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def same(source: Source) -> None:
    """The loaded model equals transformers' own."""
    assert source.path is not None
    with torch.no_grad():
        assert torch.equal(source.load(torch.float32)(ids()).logits, original(source.path)(ids()).logits)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_load_equals_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    source = open_model(saved(tmp_path, kind, tie_word_embeddings=tied))
    same(source)
    assert source.task == "text"
    assert source.context == 64
    assert source.parameters == sum(p.numel() for p in original(tmp_path).parameters())
    assert source.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("rope", [LLAMA3 | {"rope_theta": 500000.0}, YARN | {"rope_theta": 10000.0}])
def test_scaled_rotary(tmp_path: Path, rope: dict[str, object]) -> None:
    same(open_model(saved(tmp_path, rope_parameters=rope)))


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    one, many = open_model(saved(tmp_path / "one")), open_model(saved(tmp_path / "many", shard="60KB"))
    assert len({info.file for info in many.infos.values()}) > 2
    assert set(one.infos) == set(many.infos)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.infos)
    same(many)
    assert set(many.hashes()) == {info.file for info in many.infos.values()} | {"config.json"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    source = open_model(saved(tmp_path, dtype=dtype))
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(source.read(name), value)
        assert source.read(name).dtype == dtype
    name = "model.embed_tokens.weight"
    assert torch.equal(source.read_rows(name, 5, 17), stored[name][5:17])
    assert source.read_rows(name, 96, 96).shape == (0, 64)
    with pytest.raises(IndexError):
        source.read_rows(name, 90, 97)
    # fresh memory: writing does not reach the file
    source.read(name).zero_()
    assert torch.equal(source.read(name), stored[name])


def test_fill_one_layer(tmp_path: Path) -> None:
    source = open_model(saved(tmp_path))
    model = source.skeleton()
    assert not model.training
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    layer = model.get_submodule("model.layers.1")
    source.fill(layer, "model.layers.1", torch.bfloat16, skip={"model.layers.1.mlp.up_proj.weight"})
    assert layer.mlp.up_proj.weight.is_meta
    assert layer.mlp.down_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.mlp.down_proj.weight, source.read("model.layers.1.mlp.down_proj.weight").bfloat16())
    assert model.get_submodule("model.layers.0").mlp.down_proj.weight.is_meta
    source.fill(layer, "model.layers.1", torch.float32)
    # what was there stays, what was missing is filled
    assert layer.mlp.up_proj.weight.dtype == torch.float32
    assert layer.mlp.down_proj.weight.dtype == torch.bfloat16
    rotary = model.get_submodule("model.rotary_emb")
    frequencies = rotary.inv_freq.clone()
    rotary.to("meta")
    source.fill(rotary, "model.rotary_emb", torch.bfloat16)
    assert torch.equal(rotary.inv_freq, frequencies)
    assert rotary.inv_freq.dtype == torch.float32


def test_nothing_stays_mapped_or_open(tmp_path: Path) -> None:
    source = open_model(saved(tmp_path))
    tensors = [source.read(name) for name in source.infos]
    assert tensors
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    opened = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
    assert not any(name.endswith(".safetensors") for name in opened)


def test_stored_names_without_prefix_and_doubled_head(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert source.tied["model.norm.weight"] == "norm.weight"
    assert "layers.0.mlp.up_proj.weight" in source.anatomy.segments()[0].tensors
    assert source.anatomy.segments()[0].name == "model.layers.0"
    with torch.no_grad():
        assert torch.equal(source.load(torch.float32)(ids()).logits, original(tmp_path)(ids()).logits)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert "lm_head.weight" not in source.infos
    assert source.parameters == sum(v.numel() for v in weights.values())
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        open_model(tmp_path)


def test_unused_tensors_are_kept_and_named(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(weights | {extra: torch.ones(8)}, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert extra in source.infos
    assert extra in source.anatomy.uncovered()
    assert extra in source.anatomy.segments()[0].tensors
    assert source.parameters == sum(v.numel() for v in weights.values())


# ---- what can be wrong with a folder; each is one sentence that says what and what to do


def _config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _cut(path: Path, size: int) -> None:
    with (path / "model.safetensors").open("r+b") as f:
        f.truncate(size)


def _weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def _header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = (path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + length])
    change(head)
    new = json.dumps(head).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


UP = "model.layers.0.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "adapter": (lambda p: ((p / "config.json").unlink(), (p / "adapter_config.json").write_text("{}")), "merge"),
    "broken config": (lambda p: (p / "config.json").write_text('{"model_type": '), "JSON"),
    "config no object": (lambda p: (p / "config.json").write_text("[]"), "JSON object"),
    "config not utf-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "JSON"),
    "no model type": (lambda p: _config(p, model_type=None), "model_type"),
    "unknown architecture": (lambda p: _config(p, model_type="qwen9"), "gpt_neox, llama, mamba"),
    "no table": (lambda p: _config(p, model_type="bloom"), "LlamaForCausalLM is none"),
    "no class": (lambda p: _config(p, architectures=["LlamaForNothing"]), "names LlamaForNothing"),
    "other head": (lambda p: _config(p, architectures=["LlamaForSequenceClassification"]), "score.weight"),
    "bad size": (lambda p: _config(p, hidden_size="many"), "config"),
    "no heads": (lambda p: _config(p, num_attention_heads=0), "config"),
    "remote code": (lambda p: _config(p, auto_map={"AutoModel": "modeling_x.X"}), "modeling_x.py"),
    "quantized": (lambda p: _config(p, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no weights"),
    "pickle": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled"),
    "gguf": (lambda p: (p / "model.safetensors").rename(p / "x.gguf"), "GGUF"),
    "empty file": (lambda p: _cut(p, 0), "truncated"),
    "seven bytes": (lambda p: _cut(p, 7), "truncated"),
    "half a header": (lambda p: _cut(p, 500), "truncated"),
    "half the data": (lambda p: _cut(p, 100_000), "truncated"),
    "one byte short": (lambda p: _cut(p, (p / "model.safetensors").stat().st_size - 1), "truncated"),
    "text as weights": (lambda p: (p / "model.safetensors").write_text("<html>not found</html>" * 9), "truncated or damaged"),
    "pointer of git lfs": (
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "truncated or damaged",
    ),
    "wrong range": (lambda p: _header(p, lambda h: h[UP].update(shape=[80, 63])), "80, 63"),
    "unknown dtype": (lambda p: _header(p, lambda h: h[UP].update(dtype="F4")), "F4"),
    "fp8": (lambda p: _weights(p, lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)})), "float8_e4m3fn"),
    "integer": (lambda p: _weights(p, lambda w: w.update({UP: w[UP].to(torch.int8)})), "int8"),
    "wrong shape": (lambda p: _weights(p, lambda w: w.update({UP: w[UP][:40].clone()})), r"\[40, 64\]"),
    "missing tensor": (lambda p: _weights(p, lambda w: w.pop(UP)), "lacks 1 of"),
    "too few layers in config": (lambda p: _config(p, num_hidden_layers=1), "num_hidden_layers"),
    "too many layers in config": (lambda p: _config(p, num_hidden_layers=3), "lacks"),
    "other width": (lambda p: _config(p, intermediate_size=81), "81"),
}


def one_sentence(message: str) -> None:
    assert "\n" not in message
    assert not message.endswith(".")
    assert ":" in message or ";" in message
    assert len(message) < 500


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, says = BAD[case]
    saved(tmp_path)
    spoil(tmp_path)
    capfd.readouterr()
    with pytest.raises(UserError, match=says) as caught:
        open_model(tmp_path)
    one_sentence(str(caught.value))
    assert capfd.readouterr() == ("", "")


def _index(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def _second(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[1]


SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda p: _second(p).unlink(), "lacks model-00002-of-"),
    "missing index": (lambda p: (p / "model.safetensors.index.json").unlink(), "download the index"),
    "broken index": (lambda p: (p / "model.safetensors.index.json").write_text("{"), "JSON"),
    "index without map": (lambda p: _index(p, lambda i: i.pop("weight_map")), "weight_map"),
    "index leaves the folder": (lambda p: _index(p, lambda i: i["weight_map"].update({UP: "../x.safetensors"})), "weight_map"),
    "tensor not in its shard": (lambda p: _index(p, lambda i: i["weight_map"].update({"extra": _second(p).name})), "extra"),
}


@pytest.mark.parametrize("case", SHARDED)
def test_bad_shards(tmp_path: Path, case: str) -> None:
    spoil, says = SHARDED[case]
    saved(tmp_path, shard="60KB")
    spoil(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        open_model(tmp_path)
    one_sentence(str(caught.value))


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(tmp_path: Path, value: float, says: str, dtype: torch.dtype) -> None:
    saved(tmp_path, dtype=dtype)
    _weights(tmp_path, lambda w: w[UP][79].fill_(value))
    source = open_model(tmp_path)
    with pytest.raises(UserError, match=f"{UP}.*{says}"):
        source.read(UP)
    with pytest.raises(UserError, match=UP):
        source.load(torch.float32)
    assert source.read_rows(UP, 0, 79).isfinite().all()


def test_file_cut_after_opening(tmp_path: Path) -> None:
    source = open_model(saved(tmp_path))
    last = max(source.infos, key=lambda name: source.infos[name].stop)
    _cut(tmp_path, source.infos[last].stop - 3)
    with pytest.raises(UserError, match="ends at byte"):
        source.read(last)


def test_own_result_names_its_original(tmp_path: Path) -> None:
    saved(tmp_path)
    assert not is_artifact(tmp_path)
    _config(tmp_path, quantization_config={"quant_method": "laconic", "format": 1, "forms": {}})
    assert is_artifact(tmp_path)
    with pytest.raises(UserError, match="the original model"):
        open_model(tmp_path)
    (tmp_path / "certificate.json").write_text(json.dumps({"model": {"spec": "/models/big"}}))
    with pytest.raises(UserError, match="/models/big"):
        open_model(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "laconic.json").write_text("{}")
    assert is_artifact(tmp_path)
    with pytest.raises(UserError, match="/models/big"):
        open_model(tmp_path)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (tmp_path / "absent", "", None, str(tmp_path / "a/b"), "./absent", "nonsense"):
        with pytest.raises(UserError) as caught:
            open_model(spec)
        one_sentence(str(caught.value))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give the folder"):
        open_model(tmp_path / "model.safetensors")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="local folder") as caught:
        open_model("someone/some-model")
    one_sentence(str(caught.value))


def test_default_model(tmp_path: Path) -> None:
    source = open_model(None, default=saved(tmp_path))
    assert source.spec == ""
    assert source.path == tmp_path


# ---- tokenizers


def _tokenizer(path: Path, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(path)


def test_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_model(saved(tmp_path))
    with pytest.raises(UserError, match="no tokenizer") as caught:
        source.tokenizer()
    one_sentence(str(caught.value))
    _tokenizer(tmp_path, 96)
    assert source.tokenizer()("w3 w95")["input_ids"] == [3, 95]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in source.companions()}
    _tokenizer(tmp_path, 97)
    with pytest.raises(UserError, match=r"ids up to 96.*96 entries") as caught:
        source.tokenizer()
    one_sentence(str(caught.value))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError):
        source.tokenizer()


# ---- modules and factories


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.example_input = torch.zeros(2, 3, 8, 8)
    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3))) * self.scale

def make():
    torch.manual_seed(0)
    return Net()

def number():
    return 3

def fails():
    raise RuntimeError("no such weights\\nat all")
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "pictures_for_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "pictures_for_test"
    sys.modules.pop("pictures_for_test", None)


def test_factory(factory: str) -> None:
    source = open_model(f"{factory}:make")
    assert source.task == "classify"
    assert source.path is None
    assert source.context == 0
    assert not source.companions()
    assert [site.name for site in source.anatomy.sites()] == ["conv", "head"]
    assert source.parameters == 3 * 4 * 9 + 4 + 8 + 10
    empty = source.skeleton()
    assert all(p.is_meta for p in empty.parameters())
    assert not empty.scale.is_meta
    assert empty.bn.running_mean.is_meta
    model = source.load(torch.float32)
    assert model.bn.num_batches_tracked.dtype == torch.int64
    x = torch.randn(2, 3, 8, 8)
    again = open_model(f"{factory}:make")
    with torch.no_grad():
        assert torch.equal(model(x), again.load(torch.float32)(x))
    assert source.hashes() == again.hashes()
    # what was handed out does not reach the source
    model.conv.weight.zero_()
    source.read("conv.weight").zero_()
    assert source.read("conv.weight").abs().sum() > 0
    assert torch.equal(source.read_rows("conv.weight", 1, 3), source.read("conv.weight")[1:3])
    with pytest.raises(UserError, match="tokenizer"):
        source.tokenizer()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{}:mke", "did you mean 'make'"),
        ("{}:number", "returned int"),
        ("{}:fails", "no such weights at all"),
        ("no_such_package.x:make", "no_such_package"),
        ("{}.inner:make", "inner"),
    ],
)
def test_bad_factory(factory: str, spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_model(spec.format(factory))
    one_sentence(str(caught.value))


def test_module_with_bad_weights() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(UserError, match="NaN"):
        open_model(model).read("weight")
    with pytest.raises(UserError, match="no weights"):
        open_model(nn.ReLU())
    with pytest.raises(UserError, match="meta"):
        open_model(nn.Linear(2, 2, device="meta"))


# ---- real weights


def test_stories260k() -> None:
    path = DATA / "stories260k"
    if not path.exists():
        pytest.skip(f"no {path}: set LACONIC_DATA to the folder of real data")
    source = open_model(path)
    assert source.parameters == 260_032
    assert source.context == 512
    assert len(header(path / "model.safetensors")) == len(source.infos) == 47
    model, tokenizer = source.load(torch.float32), source.tokenizer()
    text = tokenizer("Once upon a time, there was a little girl named", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(text, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )
