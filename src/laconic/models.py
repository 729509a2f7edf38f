"""Opening a model: a Hugging Face folder read tensor by tensor, a hub id, or a `package.module:function` that returns a module.

Weights are read by pread into fresh memory: a mapped page would count as memory of the process. All that is wrong with a model is
found when it is opened, from headers and names alone; NaN and infinite weights are found when a tensor is read."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import logging
import os
import re
import struct
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from laconic.anatomy import stored_names, traced_anatomy
from laconic.architectures import DECODERS, decoder_anatomy
from laconic.core.errors import UserError, nearest
from laconic.core.site import Anatomy
from laconic.encoders import class_of, feed
from laconic.experts import single, split_experts
from laconic.kernels.place import here

# names of safetensors, and what torch calls them
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX = "model.safetensors.index.json"
# entries looked at once in the check for NaN, bytes hashed at once
CHUNK = 1 << 22
# what is copied beside the weights of a compressed model
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


NOTHING: Mapping[str, Tensor] = {}


class TensorInfo(NamedTuple):
    """A stored tensor: where its bytes lie. `file` is a name in the model's folder, [start, stop) counts from the file's first byte;
    for a factory the file is empty and the range is [0, bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int


class Source(ABC):
    """An opened model. `tied` maps a parameter's name in the module to the stored name where they differ."""

    spec: str
    path: Path | None
    config: Any | None
    infos: Mapping[str, TensorInfo]
    task: Literal["text", "classify"]
    parameters: int
    tied: Mapping[str, str]
    context: int
    # in memory as a whole and taken apart by running it once, for want of a row of data
    traced: bool = False
    # sentences that the plan repeats
    notes: tuple[str, ...] = ()
    _computed: Mapping[str, Tensor]

    @property
    @abstractmethod
    def anatomy(self) -> Anatomy:
        """What the model is made of; of a factory's module only once it was traced."""

    @abstractmethod
    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        """Gives the example input of which a module without a known architecture is traced, and further inputs that are the same for
        every sample; others ignore it."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis, fresh memory, stored dtype. Raises UserError where a weight is NaN or infinite."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The whole module without weights: parameters and stored buffers on meta, computed buffers real, eval mode, no gradients."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer; UserError where there is none or its ids exceed the vocabulary."""

    @abstractmethod
    def companions(self) -> list[Path]:
        """Files to be copied beside the weights: config, tokenizer, chat template, licence."""

    @abstractmethod
    def hashes(self) -> dict[str, str]:
        """sha256 in hex of each file of weights and of the config, or of a factory's state dict."""

    def read(self, name: str) -> Tensor:
        """A whole stored tensor, fresh memory, stored dtype. Raises UserError where a weight is NaN or infinite."""
        shape = self.infos[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1)

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Collection[str] = ()) -> None:
        """Reads every parameter and buffer of `module` that is on meta; `prefix` is its path in the skeleton ("" is the whole model).

        Floating ones take `dtype`. `skip` holds names (of the module or stored) that stay as they are."""
        filled: dict[str, nn.Parameter] = {}
        for path, owner in list(module.named_modules()):
            at = ".".join(part for part in (prefix, path) if part)
            for leaf, parameter in list(owner._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                name = f"{at}.{leaf}" if at else leaf
                stored = self.tied.get(name, name)
                if name in skip or stored in skip:
                    continue
                if stored not in filled:
                    filled[stored] = nn.Parameter(_as(self.read(stored), dtype), requires_grad=False)
                owner._parameters[leaf] = filled[stored]
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is None or not buffer.is_meta:
                    continue
                name = f"{at}.{leaf}" if at else leaf
                stored = self.tied.get(name, name)
                if name in skip or stored in skip:
                    continue
                # computed buffers keep their own dtype: frequencies in bf16 would be wrong
                owner._buffers[leaf] = self._own(name) if name in self._computed else _as(self.read(stored), dtype)

    def _own(self, name: str) -> Tensor:
        """A computed buffer, for one module to keep."""
        return here(self._computed[name].clone())

    def _with_computed(self, module: nn.Module) -> nn.Module:
        """The module, its computed buffers filled."""
        for name in self._computed:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = self._own(name)
        return module

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The whole original in memory."""
        module = self.skeleton()
        self.fill(module, "", dtype)
        return module


class Derived(Source):
    """A model that is computed from another, its `original`, of which figures over all parameters, hashes, tokenizer and files are."""

    def __init__(self, original: Source) -> None:
        self.original = original
        self.spec, self.path, self.config, self.task = original.spec, original.path, original.config, original.task
        self.parameters, self.tied, self.context = original.parameters, original.tied, original.context
        self.traced, self._computed = original.traced, original._computed
        self.notes: tuple[str, ...] = tuple(getattr(original, "notes", ()))
        # what a plan says of it
        self.record: dict[str, Any] = {}

    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        """Nothing to do: the original is known."""

    def tokenizer(self) -> Any:
        return self.original.tokenizer()

    def companions(self) -> list[Path]:
        return self.original.companions()

    def hashes(self) -> dict[str, str]:
        return self.original.hashes()


def stored_paths(opened: Any, module: nn.Module, prefix: str = "") -> dict[str, str]:
    """Where a module of an opened model (or the whole of it) holds what is stored: path of the first parameter by stored name."""
    found: dict[str, str] = {}
    for path, _ in module.named_parameters():
        name = f"{prefix}.{path}" if prefix else path
        found.setdefault(opened.tied.get(name, name), path)
    return found


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _finite(value: Tensor, name: str, where: str) -> Tensor:
    if value.is_floating_point():
        flat = value.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            # one pass without temporaries; NaN comes through
            low, high = torch.aminmax(part)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad = int((~torch.isfinite(part)).sum())
                what = "NaN" if bool(torch.isnan(part).any()) else "infinite"
                raise UserError(f"tensor {name} of {where} holds {what} weights ({bad} or more): take an undamaged copy of the model")
    return value


# ---- folders


class _Folder(Source):
    """What all Hugging Face folders have in common."""

    # files of weights
    _weight_files: Collection[str]
    _hashes: dict[str, str] | None = None

    def companions(self) -> list[Path]:
        assert self.path is not None
        return sorted({file for pattern in COMPANIONS for file in self.path.glob(pattern) if file.is_file()})

    def hashes(self) -> dict[str, str]:
        assert self.path is not None
        if self._hashes is None:
            # gigabytes are read for these: once for each opened model
            self._hashes = {file: _sha256(self.path / file) for file in sorted({*self._weight_files, "config.json"})}
        return dict(self._hashes)


class FolderSource(_Folder):
    """A folder whose architecture has a row of data. Holds the headers of its files, no weights."""

    def __init__(self, spec: str, path: Path, raw: Mapping[str, Any]) -> None:
        self.spec, self.path = spec, path
        self.infos = single(_headers(path))
        with _quiet():
            self.config = _transformers_config(path, raw)
        self.row = DECODERS[raw["model_type"]]
        self.task = "text"
        self.context = int(getattr(self.config, "max_position_embeddings", 0) or 0)
        model = self._build()
        self._computed = _compute(model, path)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        shapes |= {name: tuple(b.shape) for name, b in model.named_buffers(remove_duplicate=False) if name not in self._computed}
        same: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            same.setdefault(id(parameter), []).append(name)
        stored, self.infos = self._match(shapes, [names for names in same.values() if len(names) > 1])
        self.notes = self._leave_out(set(stored.values()), model)
        self.tied = {name: found for name, found in stored.items() if name != found}
        self.parameters = sum(_count(self.infos[name].shape) for name in set(stored.values()))
        self._weight_files = {info.file for info in self.infos.values()}
        self._anatomy = decoder_anatomy(self.row, self.config, {n: i.shape for n, i in self.infos.items()}, stored)

    def _leave_out(self, used: set[str], model: Any) -> tuple[str, ...]:
        """Drops what the model's class says old checkpoints store for nothing (causal masks, as wide as the context is squared); a sentence
        that names it. Other tensors without a use are kept."""
        patterns = model._keys_to_ignore_on_load_unexpected or ()
        gone = [name for name in self.infos if name not in used and any(re.search(pattern, name) for pattern in patterns)]
        self.infos = {name: info for name, info in self.infos.items() if name not in gone}
        return (f"left out, as transformers computes it: {gone[0]} and {len(gone) - 1} more like it",) if gone else ()

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        """Nothing to do: the architecture is known."""

    def _build(self) -> Any:
        from transformers import AutoModelForCausalLM

        with _quiet():
            try:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
                raise UserError(f"{self.path}/config.json describes no model that can be built ({_short(error)}): correct it") from error
        split_experts(model)
        return model.eval().requires_grad_(False)

    def _match(self, shapes: Mapping[str, tuple[int, ...]], same: list[list[str]]) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        """Parameter name -> stored name for all of the module, and the stored tensors without doubles of tied ones."""
        infos = dict(self.infos)
        stored: dict[str, str] = {}
        for name in shapes:
            if found := stored_name(name, infos):
                stored[name] = found
        for names in same:
            have = list(dict.fromkeys(stored[n] for n in names if n in stored))
            if not have:
                continue
            for double in have[1:]:
                self._check_double(have[0], double)
                del infos[double]
            stored |= dict.fromkeys(names, have[0])
        if missing := [name for name in shapes if name not in stored]:
            raise UserError(
                f"{self.path} lacks {len(missing)} of {len(shapes)} tensors that its config.json asks for, {missing[0]} among them: "
                "take a complete copy of the model, or correct config.json"
            )
        for name, shape in shapes.items():
            info = infos[stored[name]]
            if info.shape != shape:
                raise UserError(
                    f"tensor {stored[name]} in {info.file} has shape {list(info.shape)} where its config.json asks for {list(shape)}: "
                    "correct config.json, or take a matching copy of the weights"
                )
            if info.dtype not in WEIGHTS:
                raise _unread(stored[name], info)
        layers = re.compile(rf"^{re.escape(self.row.blocks)}\.(\d+)\.")
        used = set(stored.values())
        for name in infos:
            layer = layers.match(name)
            if name not in used and layer and int(layer[1]) >= int(self.config.num_hidden_layers):  # type: ignore[union-attr]
                raise UserError(
                    f"{self.path} holds {name}, but its config.json has num_hidden_layers {self.config.num_hidden_layers}: "  # type: ignore[union-attr]
                    "correct config.json, or take a matching copy of the weights"
                )
        return stored, infos

    def _check_double(self, kept: str, double: str) -> None:
        a, b = self.infos[kept], self.infos[double]
        step = max(1, CHUNK // max(1, _count(a.shape[1:])))
        equal = a.shape == b.shape and a.dtype == b.dtype
        for start in range(0, a.shape[0], step) if equal else ():
            stop = min(start + step, a.shape[0])
            if not torch.equal(self.read_rows(kept, start, stop), self.read_rows(double, start, stop)):
                equal = False
                break
        if not equal:
            raise UserError(
                f"{self.path} stores {kept} and {double} with different values, but its config.json ties them: "
                "set tie_word_embeddings to false in config.json if both are meant"
            )

    def skeleton(self) -> nn.Module:
        return self._with_computed(self._build())

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        assert self.path is not None
        info = self.infos[name]
        rows = info.shape[0] if info.shape else 1
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {rows}")
        return here(_finite(read_stored(self.path, info, slice(start, stop)), name, info.file))

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with _quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise UserError(
                    f"{self.path} has no tokenizer that can be read ({_short(error)}): copy the original's files (tokenizer.json, "
                    "tokenizer_config.json) into it"
                ) from error
        rows = self.infos[self._anatomy.tail[0].tensors["weight"].name].shape[0]
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest < 0:
            raise UserError(f"the tokenizer of {self.path} is empty: copy the original's tokenizer files into it")
        if largest >= rows:
            raise UserError(
                f"the tokenizer of {self.path} gives ids up to {largest}, but the model's vocabulary has {rows} entries: "
                "take the tokenizer that belongs to this model"
            )
        return tokenizer


# names that transformers' classes give to the model below the head
BASES = ("model", "transformer", "gpt_neox", "backbone")
# what transformers renames when it reads a checkpoint: in the module -> in the file
RENAMED = (
    (re.compile(r"^lm_head\."), "embed_out."),
    (re.compile(r"\.embeddings\."), ".embedding."),
    (re.compile(r"\.mlp\.gate\."), ".block_sparse_moe.gate."),
    (re.compile(r"\.mlp\.experts\.(\d+)\.gate_proj\."), r".block_sparse_moe.experts.\1.w1."),
    (re.compile(r"\.mlp\.experts\.(\d+)\.up_proj\."), r".block_sparse_moe.experts.\1.w3."),
    (re.compile(r"\.mlp\.experts\.(\d+)\.down_proj\."), r".block_sparse_moe.experts.\1.w2."),
)


def stored_name(parameter: str, stored: Collection[str]) -> str | None:
    """The stored name of a module's parameter: the same, or with the base model's prefix left out or added, as headless checkpoints do."""
    base, _, rest = parameter.partition(".")
    others = (pattern.sub(other, parameter) for pattern, other in RENAMED)
    for name in (parameter, rest if base in BASES else parameter, f"model.{parameter}", *others):
        if name in stored:
            return name
    return None


def _unread(name: str, info: TensorInfo) -> UserError:
    held = str(info.dtype).removeprefix("torch.")
    return UserError(f"tensor {name} in {info.file} is held as {held}, which is not read yet: give the model in bf16, fp16 or fp32")


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _close(kind: str) -> str:
    hint = nearest(kind, DECODERS)
    return hint.rstrip("?") if "did you mean" in hint else ""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{path} holds an adapter, not a model: merge it into its base model first")
        raise UserError(f"{path} has no config.json: give a folder that transformers' save_pretrained wrote")
    return _json(file)


def _check_config(path: Path, raw: Mapping[str, Any]) -> None:
    where = f"{path}/config.json"
    if auto := raw.get("auto_map"):
        files = sorted({str(v).split(".")[0].split("--")[-1] + ".py" for v in auto.values() if v}) if isinstance(auto, dict) else [auto]
        code = ", ".join(files)
        raise UserError(
            f"{where} asks for code of its own (auto_map: {code}), which laconic does not run: remove auto_map if transformers' own "
            f"{raw.get('model_type', '')!r} is meant, or give the model as package.module:function"
        )
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        if method == "laconic":
            raise UserError(f"{path} is already a result of laconic: give {_original_of(path)}")
        raise UserError(
            f"{path} was already quantized by another tool ({method}), which laconic does not read yet: give the original model"
        )
    if not raw.get("model_type"):
        raise UserError(f"{where} names no model_type: give a folder that transformers' save_pretrained wrote")


def has_row(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a language model that a row of data takes apart; other classes of transformers are traced."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type", "")
    return kind in DECODERS and set(raw.get("architectures") or []) <= {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "")}


def class_named(path: Path, raw: Mapping[str, Any]) -> Any:
    """transformers' class that a config.json names; UserError where it names none."""
    from transformers import CONFIG_MAPPING

    names, kind = raw.get("architectures") or [], raw.get("model_type")
    found = class_of(names[0]) if len(names) == 1 and kind in CONFIG_MAPPING else None
    if found is None:
        said = f"names {', '.join(names)}" if names else "names no architecture"
        raise UserError(
            f"{path}/config.json describes a {kind!r} and {said}, of which laconic has neither a row of data (there are rows for "
            f"{', '.join(sorted(DECODERS))}){_close(str(kind))} nor transformers a class: correct it, or give the model as "
            "package.module:function, which is traced"
        )
    if found.config_class.model_type != kind:
        raise UserError(f"{path}/config.json describes a {kind!r}, but its class {names[0]} is none: correct architectures or model_type")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON ({_short(error)}): take an undamaged copy of it") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object: take an undamaged copy of it")
    return found


def _original_of(path: Path) -> str:
    try:
        spec = json.loads((path / "certificate.json").read_text(encoding="utf-8"))["model"]["spec"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the original model instead"
    return f"its original, {spec}, instead" if spec else "its original, the embedded default (leave the model out), instead"


def _transformers_config(path: Path, raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{path}/config.json is no {raw['model_type']} config that transformers reads ({_short(error)}): correct it"
        ) from error


def _files(path: Path) -> dict[str, list[str] | None]:
    """Files of weights with the tensors that the index expects in each (None without an index)."""
    found = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith(("consolidated", "adapter")))
    index = path / INDEX
    if index.is_file():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) and Path(v).name == v for v in weights.values()):
            raise UserError(f"{index} has no weight_map from tensors to files of the folder: take an undamaged copy of it")
        files: dict[str, list[str] | None] = {}
        for tensor, file in weights.items():
            names = files.setdefault(file, [])
            assert names is not None
            names.append(tensor)
        if missing := sorted(file for file in files if not (path / file).is_file()):
            raise UserError(f"{path} lacks {missing[0]} ({len(missing)} of {len(files)} files named in {INDEX}): download the model again")
        return files
    if "model.safetensors" in found:
        return {"model.safetensors": None}
    if len(found) == 1 and "-of-" not in found[0]:
        return {found[0]: None}
    if found:
        raise UserError(f"{path} holds {len(found)} parts of weights ({found[0]} ...) but no {INDEX}: download the index too")
    pickles = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern) if file.name != "training_args.bin"
    )
    if pickles:
        raise UserError(f"{path} has only pickled weights ({pickles[0]}), which can run code when read: save the model with safetensors")
    if any(path.glob("*.gguf")):
        raise UserError(f"{path} has only GGUF weights, which are not read yet: give the original folder with safetensors")
    raise UserError(f"{path} holds no weights: model.safetensors or its parts are expected; download the model again")


def _headers(path: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file, expected in _files(path).items():
        here = header(path / file)
        for tensor in expected or ():
            if tensor not in here:
                raise UserError(f"{path / file} lacks tensor {tensor}, which {INDEX} places there: download that file again")
        wanted = set(expected) if expected is not None else None
        infos |= {name: info for name, info in here.items() if wanted is None or name in wanted}
    if not infos:
        raise UserError(f"{path} holds no tensors: download the model again")
    return infos


def header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header; UserError where header or data are not whole."""
    cure = "the file is truncated or damaged; take an undamaged copy"
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            first = f.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 0 < length <= min(size - 8, 100_000_000):
                raise UserError(f"{file} has no whole safetensors header ({size:,} bytes in all): {cure}")
            raw = json.loads(f.read(length))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it readable") from error
    except ValueError as error:
        raise UserError(f"{file} has a header that is not JSON: {cure}") from error
    infos: dict[str, TensorInfo] = {}
    if not isinstance(raw, dict):
        raise UserError(f"{file} has a header that is no JSON object: {cure}")
    for name, entry in raw.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (start, stop) = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"tensor {name} of {file} is not described as safetensors asks: {cure}") from error
        if kind not in DTYPES:
            raise UserError(f"tensor {name} of {file} is held as {kind}, which is not read yet: give the model in bf16, fp16 or fp32")
        begin = 8 + length + start
        if not 0 <= start <= stop or 8 + length + stop > size:
            raise UserError(f"tensor {name} should end at byte {8 + length + stop:,} of {file}, which has {size:,}: {cure}")
        if stop - start != _count(shape) * DTYPES[kind].itemsize:
            raise UserError(f"tensor {name} of {file} has {stop - start:,} bytes, not those of {list(shape)} in {kind}: {cure}")
        infos[name] = TensorInfo(DTYPES[kind], shape, file.name, begin, 8 + length + stop)
    return infos


def read_stored(folder: Path, info: TensorInfo, rows: slice = slice(None)) -> Tensor:
    """A tensor of a safetensors file, or some of its rows, on the processor; exactly their bytes are read. A scalar has no rows."""
    file, shape, offset = folder / info.file, info.shape, info.start
    if shape:
        start, stop, _ = rows.indices(shape[0])
        offset += (info.stop - info.start) // max(shape[0], 1) * start
        shape = (stop - start, *shape[1:])
    into = torch.empty(shape, dtype=info.dtype, device="cpu")
    if not into.numel():
        return into
    view = memoryview(into.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it back and give the same command again") from error
    try:
        done = 0
        while done < len(view):
            # one call reads at most 2 GiB
            got = os.preadv(handle, [view[done : done + (1 << 30)]], offset + done)
            if not got:
                raise UserError(f"{file} ends at byte {offset + done:,} where {offset + len(view):,} were expected: take an undamaged copy")
            done += got
    finally:
        os.close(handle)
    return into


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _compute(model: Any, path: Path) -> dict[str, Tensor]:
    """The buffers that no file stores (rotary frequencies, the scale of a table), computed as transformers does after building a model
    on meta: by the module built anew where a config is all it takes, else by the model's own initialization of that one module."""
    computed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        leaves = [leaf for leaf in module._non_persistent_buffers_set if module._buffers.get(leaf) is not None]
        if not leaves:
            continue
        with _quiet():
            real: nn.Module = type(module)(module.config) if hasattr(module, "config") else _initialized(model, module, leaves)
        for leaf in leaves:
            value = real._buffers[leaf]
            if value is None or value.is_meta or bool(torch.isnan(value).any()):
                raise UserError(
                    f"the buffer {name}.{leaf} of {path} is stored nowhere and cannot be computed: give a supported architecture"
                )
            computed[f"{name}.{leaf}"] = value.detach()
    return computed


def _initialized(model: Any, module: nn.Module, leaves: Collection[str]) -> nn.Module:
    """A copy of a module on meta with `leaves` real, NaN where the model's initialization does not set them."""
    real = copy.copy(module)
    real._buffers = dict(module._buffers)
    for leaf in leaves:
        empty = module._buffers[leaf]
        assert empty is not None
        real._buffers[leaf] = torch.full(empty.shape, torch.nan if empty.is_floating_point() else 0, dtype=empty.dtype)
    with torch.no_grad():
        model._init_weights(real)
    return real


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers keeps its warnings to itself inside; all settings are put back."""
    from transformers.utils import logging as speech

    level, root = speech.get_verbosity(), logging.getLogger("transformers")
    propagate, bars = root.propagate, speech.is_progress_bar_enabled()
    speech.set_verbosity(logging.CRITICAL)
    speech.disable_progress_bar()
    root.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        speech.set_verbosity(level)
        if bars:
            speech.enable_progress_bar()
        root.propagate = propagate


# ---- modules


class ModuleSource(Source):
    """A torch module, given as it is or made by `package.module:function`; its state dict is what is stored."""

    def __init__(self, spec: str, module: nn.Module) -> None:
        self.spec, self.path, self.config = spec, None, None
        self.task, self.context, self.traced = "classify", 0, True
        self.module = module
        infos: dict[str, TensorInfo] = {}
        self._values: dict[str, Tensor] = {}
        names = stored_names(module)
        held = module.state_dict(keep_vars=True)
        for name in dict.fromkeys(names.values()):
            value = held[name].detach()
            infos[name] = TensorInfo(value.dtype, tuple(value.shape), "", 0, value.numel() * value.element_size())
            self._values[name] = value
        if not infos:
            raise UserError(f"the module of {spec} has no weights: return a module with parameters")
        self.infos, self.tied = infos, {name: kept for name, kept in names.items() if name != kept}
        own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.parameters = sum(_count(info.shape) for name, info in infos.items() if name in own)
        if any(value.is_meta for value in self._values.values()):
            raise UserError(f"the module of {spec} has weights on meta: load its weights before returning it")
        self._computed = {name: b.detach() for name, b in module.named_buffers(remove_duplicate=False) if name not in names}
        self._anatomy: Anatomy | None = None
        if isinstance(example := getattr(module, "example_input", None), (Tensor, tuple)):
            self.trace(example)

    @property
    def anatomy(self) -> Anatomy:
        if self._anatomy is None:
            raise UserError(
                f"the module of {self.spec} was not run yet: give data, or set its attribute example_input to a batch of inputs"
            )
        return self._anatomy

    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        """Runs the module once; the first trace stays."""
        if given:
            raise UserError(f"{self.spec} takes one input, but the data has further ones ({', '.join(given)}): let the module hold them")
        if self._anatomy is None:
            self._anatomy = traced_anatomy(self.module, example)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        value = self._values[name]
        value = value[start:stop].clone() if value.dim() else value.clone()
        return here(_finite(value.contiguous(), name, self.spec))

    def skeleton(self) -> nn.Module:
        # copies the module around its weights: what is stored goes to meta without being copied
        memo: dict[int, Any] = {}
        kept = self.module.state_dict(keep_vars=True)
        for value in kept.values():
            if id(value) in memo or not isinstance(value, Tensor):
                continue
            empty = torch.empty_like(value, device="meta")
            memo[id(value)] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
        made = copy.deepcopy(self.module, memo).eval().requires_grad_(False)
        for buffer in made.buffers():
            if not buffer.is_meta:
                buffer.data = here(buffer.data)
        return made

    def tokenizer(self) -> Any:
        raise UserError(f"{self.spec} has no tokenizer: text commands need a Hugging Face folder")

    def companions(self) -> list[Path]:
        return []

    def hashes(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for name in sorted(self._values):
            value = self._values[name].contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            flat = value.reshape(-1).view(torch.uint8).cpu()
            for start in range(0, flat.numel(), CHUNK):
                digest.update(flat[start : start + CHUNK].numpy().tobytes())
        return {"state_dict": digest.hexdigest()}


class ModuleFolder(_Folder, ModuleSource):
    """A Hugging Face folder of a class without a row of data (encoders, vision, speech, encoder-decoders): in memory, and traced."""

    def __init__(self, spec: str, path: Path, raw: Mapping[str, Any]) -> None:
        known = class_named(path, raw)
        infos = _headers(path)
        for name, info in infos.items():
            if info.dtype.is_floating_point and info.dtype not in WEIGHTS:
                raise _unread(name, info)
        module = _loaded(known, path, raw)
        super().__init__(spec, module)
        self.path, self.config = path, module.config
        self._weight_files = {info.file for info in infos.values()}

    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        """Runs the class once, fed as its signature asks; the first trace stays."""
        if self._anatomy is None:
            self._anatomy = traced_class(self.module, example, given)


def traced_class(module: Any, example: Any, given: Mapping[str, Tensor]) -> Anatomy:
    """The anatomy of a class of transformers, which from then on takes one input (`encoders.feed`)."""
    feed(module, given)
    try:
        with torch.no_grad():
            module(example)
    except UserError:
        raise
    except Exception as error:
        name = type(module).__name__
        raise UserError(
            f"{name} cannot be run on inputs {tuple(example.shape)} of the data ({_short(error)}): let the data's function yield what "
            f"{name} takes, and hold further inputs that it needs in an attribute `given` (name -> tensor)"
        ) from error
    return traced_anatomy(module, example)


def _loaded(known: Any, path: Path, raw: Mapping[str, Any]) -> Any:
    with _quiet():
        config = _transformers_config(path, raw)
        try:
            module, found = known.from_pretrained(
                str(path), config=config, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True,
                attn_implementation="eager",
            )  # fmt: skip
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be built as {known.__name__} ({_short(error)}): correct config.json, or take a matching copy of the weights"
            ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} tensors that its config.json asks for, {missing[0]} among them: "
            "take a complete copy of the model, or correct config.json"
        )
    return module.eval().requires_grad_(False)


def call_factory(spec: str) -> Any:
    """What `package.module:function` returns; the working directory is on the path."""
    path, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            raise UserError(f"no module {error.name!r} for {spec}: give package.module:function as seen from {here}") from error
        raise UserError(f"{path} needs {error.name}, which is not installed: install it") from error
    except Exception as error:
        raise UserError(f"{path} cannot be imported ({type(error).__name__}: {_short(error)}): correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"{path} has no function {name!r}{nearest(name, public) if public else ''}: give package.module:function")
    try:
        return function()
    except Exception as error:
        raise UserError(f"{spec} failed ({type(error).__name__}: {_short(error)}): correct it") from error


# ---- the door


def is_artifact(path: str | Path) -> bool:
    """Whether a folder was written by laconic."""
    folder = Path(path)
    if (folder / "laconic.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "laconic")
    except (OSError, ValueError, KeyError, TypeError):
        return False


FACTORY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
HUB = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def open_model(spec: str | Path | nn.Module | None, *, default: Path | None = None) -> Source:
    """Opens a folder, a hub id, a factory or a module; None is the embedded default. Raises UserError for all that is wrong with it."""
    if isinstance(spec, nn.Module):
        return ModuleSource(f"{type(spec).__module__}:{type(spec).__qualname__}", spec)
    if spec is None or spec == "":
        if default is None:
            raise UserError("no model was given: name a Hugging Face folder, a hub id or package.module:function")
        return open_folder("", Path(default))
    text = str(spec)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / "laconic.json").is_file():
            raise UserError(f"{path} is already a result of laconic: give {_original_of(path)}")
        return open_folder(text, path)
    if path.is_file():
        raise UserError(f"{path} is a file: give the folder with config.json that it belongs to")
    if FACTORY.match(text):
        module = call_factory(text)
        if not isinstance(module, nn.Module):
            raise UserError(f"{text} returned {type(module).__name__}, not a torch.nn.Module: return the module")
        return ModuleSource(text, module.eval())
    if isinstance(spec, str) and HUB.match(text):
        return open_folder(text, _download(text))
    raise UserError(f"no such model folder: {text}; give a Hugging Face folder, a hub id (org/name) or package.module:function")


def open_folder(spec: str, path: Path) -> Source:
    """A Hugging Face folder, by its row of data or as transformers' class."""
    raw = _config(path)
    _check_config(path, raw)
    return FolderSource(spec, path, raw) if has_row(raw) else ModuleFolder(spec, path, raw)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = ["*.safetensors", INDEX, "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"], etag_timeout=10))
    except GatedRepoError as error:
        raise UserError(f"{name} asks for a licence to be accepted: accept it on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is no folder here and no model on the hub: correct the name, or log in if it is private") from error
    except Exception as error:
        raise UserError(
            f"{name} is no folder here and cannot be fetched from the hub ({type(error).__name__}): "
            "connect to a network, or give a local folder"
        ) from error
