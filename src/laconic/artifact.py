"""Reading what laconic wrote: a folder as a torch module with Held layers, whole (`load`) or piece by piece (`stream`).

config.json holds `quantization_config: {"quant_method": "laconic", "format": 1, "forms": {stored name: description}}`; the result of a
factory has laconic.json with `factory`, `format` and `forms` instead. The tensors of a form are stored as `<stored name>.<key>`; every
other tensor keeps its name. `shapes` names tensors that are smaller than the config or the factory says, since channels were cut.

A folder with elastic.json loads at any size up to its own (`limit`, in bytes): forms are cut to their first parts, the bytes of the others
are not read. `slices` lists, in the order of the files, the tensor that gets its next part, and the bytes of the model up to there;
`together` the tensors that get theirs with it. Of slices of channels the first ones are a narrower model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.architectures import DECODERS, decoder_anatomy
from laconic.core.errors import UserError
from laconic.core.packed import Held, Packed, restore
from laconic.core.part import Part, restore_part
from laconic.core.router import Routed
from laconic.core.site import Anatomy
from laconic.encoders import feed
from laconic.experts import split_experts
from laconic.journal import sha256_of
from laconic.kernels.gpu import load as load_kernels
from laconic.kernels.place import here
from laconic.models import (
    NOTHING,
    Source,
    TensorInfo,
    _compute,
    _headers,
    _json,
    _quiet,
    _short,
    _transformers_config,
    class_named,
    has_row,
    header,
    is_artifact,
    open_model,
    read_stored,
    stored_name,
    traced_class,
)
from laconic.narrow import Shape, narrow

FORMAT = 1
# parts that stand beside the model, in a file of their own, so that readers who do not know them have a whole model
PLACED = "placed.safetensors"
ONE_SIZE = "{} has one size and cannot be cut: leave the budget out, or compress again with --recipe bitstack or matformer"
# layers whose arithmetic Held knows; a form of any other module's weight is read as a dense tensor
HOLDABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# classes of transformers that Held knows: a linear whose weight is stored as (m, n), tables that scale their rows
KNOWN = ("Conv1D", "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


def by_form(names: Iterable[str], forms: Collection[str]) -> dict[str, dict[str, str]]:
    """Stored name of a form -> key of `Packed.tensors()` -> the name it has in the file; tensors that no form holds are left out."""
    found: dict[str, dict[str, str]] = {name: {} for name in forms}
    for name in names:
        at = name.rfind(".")
        while at > 0:
            if name[:at] in found:
                found[name[:at]][name[at + 1 :]] = name
                break
            at = name.rfind(".", 0, at)
    return found


def blank(forms: Mapping[str, Any], infos: Mapping[str, TensorInfo], where: Path) -> dict[str, Packed]:
    """Every form with its tensors on meta: all of its structure, none of its bytes."""
    # the model may be moved to a GPU
    load_kernels()
    made = {}
    for name, keys in by_form(infos, forms).items():
        empty = {key: torch.empty(infos[full].shape, dtype=infos[full].dtype, device="meta") for key, full in keys.items()}
        made[name] = _restored(forms[name], empty, name, where)
    return made


def _restored(described: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, where: Path) -> Packed:
    try:
        return restore(described, tensors)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        what = f"{type(error).__name__}: {_short(error)}"
        raise UserError(f"the form of {name} in {where} cannot be read ({what}): write the folder again") from error
    except (ModuleNotFoundError, AttributeError) as error:
        form = described.get("form")
        raise UserError(f"{where} holds {name} as {form}, which this version of laconic does not know: update laconic") from error


def parts(placed: Mapping[str, Any], where: Path) -> dict[str, Part]:
    """What stands in the place of modules that are gone, by their paths."""
    made = {}
    for name, described in placed.items():
        try:
            made[name] = restore_part(described)
        except (KeyError, TypeError, ValueError, ModuleNotFoundError, AttributeError) as error:
            raise UserError(f"{where} places {described} at {name}, which this version of laconic does not know: update laconic") from error
    return made


def holdable(layer: nn.Module) -> bool:
    """Whether a Held can stand in this layer's place: exactly one of torch's own layers, since subclasses compute something else, or one
    of those that Held knows by name."""
    kind = type(layer)
    known = kind in HOLDABLE or (kind.__name__ in KNOWN and kind.__module__.startswith("transformers."))
    return known and getattr(layer, "padding_mode", "zeros") == "zeros"


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Set the submodule at `path`; a Routed part takes in what stood there."""
    if isinstance(layer, Routed):
        layer.around(path, module)
        layer.train(module.training)
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner).register_module(leaf, layer)


def stand(module: nn.Module, path: str, part: Part) -> None:
    """Let a part take over the submodule at `path`."""
    part.over(module.get_submodule(path))
    put(module, path, part)


class Elastic(NamedTuple):
    """elastic.json: bytes of the least model; (tensor, bytes of the model with it) for each slice, in order; parameters of the model; all
    that get their slices together with a tensor, where it is not alone."""

    parameters: int
    least: int
    slices: tuple[tuple[str, int], ...]
    together: Mapping[str, tuple[str, ...]] = {}

    def counts(self, limit: int) -> dict[str, int]:
        """How many parts of each tensor fit `limit` bytes: the longest prefix. UserError where not even the first parts do."""
        if limit < self.least:
            raise UserError(
                f"the budget of {limit:,} bytes is below what this result can be cut to: the least is {self.least:,} bytes; ask for "
                f"size={math.ceil(self.least / 1e4) / 1e2:.2f}MB (bits={math.ceil(self.least * 8e3 / self.parameters) / 1e3:g}) or more"
            )
        found = dict.fromkeys((name for name, _ in self.slices), 1)
        for name, size in self.slices:
            if size > limit:
                break
            found[name] += 1
        return {member: count for name, count in found.items() for member in self.together.get(name, (name,))}


def elastic(path: str | Path) -> Elastic | None:
    """How a folder may be cut; None where it has one size."""
    file = Path(path).expanduser() / "elastic.json"
    if not file.is_file():
        return None
    found = _json(file)
    try:
        if found["format"] != FORMAT:
            raise UserError(f"{file} has format {found['format']}, this version of laconic reads format {FORMAT}: update laconic")
        slices = tuple((str(one["tensor"]), int(one["bytes"])) for one in found["slices"])
        together = {name: tuple(map(str, members)) for name, members in found.get("together", {}).items()}
        return Elastic(int(found["parameters"]), int(found["least"]), slices, together)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {_short(error)}): take an undamaged copy of it") from error


class _Part(NamedTuple):
    """A tensor of a form: the module's parameter it stands in for, that one's stored name, and its own name in the file."""

    parameter: str
    stored: str
    full: str


class Artifact(Source):
    """An opened result with the interface of an original: `read` gives what the forms stand for, `fill` fills Held layers.

    `infos` lists tensors by the names of the original, a form as fp32 of its shape with the bytes it takes; `stored` lists what the
    files hold. Holds no weights. limit: cut to so many bytes, which only an elastic result can be."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.spec, self.path = str(path), path
        factory, self.forms, self.shapes, self.placed = _manifest(path)
        self.stored = _headers(path)
        if limit is not None:
            self._cut(limit)
        self._keys = by_form(self.stored, self.forms)
        self._original: Source | None = None
        if factory is None:
            raw = _json(path / "config.json")
            with _quiet():
                self.config = _transformers_config(path, raw)
            del self.config.quantization_config
            self._class = None if has_row(raw) else class_named(path, raw)
            self.traced = self._class is not None
            context = int(getattr(self.config, "max_position_embeddings", 0) or 0)
            self.task, self.context = ("classify", 0) if self.traced else ("text", context)
            bare = self._narrow(self._build())
            self._computed = _compute(bare, path)
        else:
            self._original, self.traced = open_model(factory), True
            self.config, self.task, self.context = None, self._original.task, self._original.context
            bare = self._narrow(self._original.skeleton())
            self._computed = self._original._computed
        self._match(bare)
        self._anatomy: Anatomy | None = None
        self._table: tuple[str, Packed | None] | None = None
        self._given: Mapping[str, Tensor] | None = None
        if not self.traced:
            shapes = {name: info.shape for name, info in self.infos.items()}
            self._anatomy = decoder_anatomy(DECODERS[self.config.model_type], self.config, shapes, self._names)  # type: ignore[union-attr]

    def _cut(self, limit: int) -> None:
        """Leaves the first parts of each form, as many as fit `limit` bytes, and forgets the tensors of the others."""
        assert self.path is not None
        index = elastic(self.path)
        if index is None:
            raise UserError(ONE_SIZE.format(self.path))
        counts = index.counts(limit)
        if missing := counts.keys() - self.forms.keys():
            raise UserError(f"{self.path}/elastic.json names {min(missing)}, which has no form here: take an undamaged copy of the folder")
        whole = blank({name: self.forms[name] for name in counts}, self.stored, self.path)
        for name, count in counts.items():
            first = whole[name].first(count)
            for key in whole[name].tensors().keys() - first.tensors().keys():
                del self.stored[f"{name}.{key}"]
            self.forms[name] = first.describe()
            if first.shape != whole[name].shape:
                self.shapes[name] = first.shape

    def _build(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        with _quiet(), torch.device("meta"):
            if self._class is not None:
                model = self._class._from_config(self.config, dtype=torch.float32, attn_implementation="eager")
            else:
                model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        split_experts(model)
        return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def _narrow(self, bare: nn.Module) -> nn.Module:
        """Without the channels that were cut."""
        if self._original is not None:
            tied = self._original.tied
            return narrow(bare, lambda name: self.shapes.get(tied.get(name, name)))
        return narrow(bare, lambda name: self.shapes.get(stored_name(name, self.shapes) or ""))

    def _match(self, bare: nn.Module) -> None:
        """Which stored tensor each parameter of the module is, and whether all are there in the right shape."""
        held = {full for keys in self._keys.values() for full in keys.values()}
        kept = {name: info for name, info in self.stored.items() if name not in held}
        known = {*self.forms, *kept}
        names: dict[str, str] = {}
        first: dict[int, str] = {}
        tensors = [*bare.named_parameters(remove_duplicate=False), *bare.named_buffers(remove_duplicate=False)]
        tensors = [(name, tensor) for name, tensor in tensors if name not in self._computed]
        for name, tensor in tensors:
            if found := stored_name(name, known):
                names[name] = found
                first.setdefault(id(tensor), found)
        self.infos = dict(kept)
        own = {id(p) for p in bare.parameters()}
        self.parameters, counted = 0, set()
        for name, tensor in tensors:
            stored = first.get(id(tensor)) or (self._original.tied.get(name) if self._original is not None else None)
            if stored is None:
                raise UserError(f"{self.path} lacks the tensor {name}: take a complete copy of the folder, or write it again")
            names[name] = stored
            shape = tuple(tensor.shape)
            if stored in self.forms and stored not in self.infos:
                size = sum(self.stored[full].stop - self.stored[full].start for full in self._keys[stored].values())
                self.infos[stored] = TensorInfo(torch.float32, shape, "", 0, size)
            if self.infos[stored].shape != shape:
                raise UserError(
                    f"tensor {stored} of {self.path} has shape {list(self.infos[stored].shape)} where its model asks for {list(shape)}: "
                    "write the folder again"
                )
            if id(tensor) in own and stored not in counted:
                counted.add(stored)
                self.parameters += tensor.numel()
        self._names = names
        self._parts = {
            f"{name}.{key}": _Part(name, stored, full) for name, stored in names.items() for key, full in self._keys.get(stored, {}).items()
        }
        self.tied = {name: stored for name, stored in names.items() if name != stored}

    @property
    def anatomy(self) -> Anatomy:
        if self._anatomy is None and self._original is None:
            raise UserError(f"{self.spec} was not run yet: give the data that it was made with")
        return self._anatomy if self._anatomy is not None else self._original.anatomy  # type: ignore[union-attr]

    def trace(self, example: Any, given: Mapping[str, Tensor] = NOTHING) -> None:
        if self._original is not None:
            self._original.trace(example, given)
        elif self._class is not None and self._anatomy is None:
            # as the original was: dense, since a trace looks for torch's own layers
            dense = self._with_computed(self._narrow(self._build()))
            super().fill(dense, "", torch.float32)
            self._given = given
            self._anatomy = traced_class(dense, example, given)

    def _tensor(self, name: str) -> Tensor:
        assert self.path is not None
        return here(read_stored(self.path, self.stored[name]))

    def packed(self, name: str) -> Packed | None:
        """The form of a stored tensor, read now; None where no form holds it."""
        if name not in self.forms:
            return None
        assert self.path is not None
        return _restored(self.forms[name], {key: self._tensor(full) for key, full in self._keys[name].items()}, name, self.path)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.forms:
            assert self.path is not None
            return here(read_stored(self.path, self.stored[name], slice(start, stop)))
        shape = self.infos[name].shape
        if (start, stop) == (0, shape[0]):
            form = self.packed(name)
        else:
            # a table that is read by rows is read many times over
            if self._table is None or self._table[0] != name:
                self._table = None
                self._table = name, self.packed(name)
            form = self._table[1]
        assert form is not None
        return form.rows(slice(start, stop)).reshape(stop - start, *shape[1:])

    def skeleton(self) -> nn.Module:
        assert self.path is not None
        bare = self._with_computed(self._narrow(self._build() if self._original is None else self._original.skeleton()))
        if self._given is not None:
            feed(bare, self._given)
        forms = blank(self.forms, self.stored, self.path)
        for path, layer in list(bare.named_modules(remove_duplicate=False)):
            form = forms.get(self._names.get(f"{path}.weight", ""))
            # what is held as it is is nothing but the tensor: the layer stays what it was
            if form is not None and not form.as_is and holdable(layer):
                put(bare, path, Held(form, layer, layer.bias if isinstance(getattr(layer, "bias", None), Tensor) else None))
        for name, part in parts(self.placed, self.path).items():
            stand(bare, name, part)
        return bare

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, skip: Collection[str] = ()) -> None:
        """As `Source.fill`; the tensors of a form keep their stored dtype. `module` may be a form or a part of one."""
        self._table = None
        theirs: list[str] = []
        for path, owner in module.named_modules(remove_duplicate=False):
            at = ".".join(part for part in (prefix, path) if part)
            if isinstance(owner, Held):
                owner.dtype = dtype
            for leaf, buffer in owner._buffers.items():
                name = f"{at}.{leaf}"
                if (found := self._parts.get(name)) is None:
                    continue
                theirs.append(name)
                if buffer is not None and buffer.is_meta and not {found.parameter, found.stored} & set(skip):
                    owner._buffers[leaf] = self._tensor(found.full)
        super().fill(module, prefix, dtype, skip={*skip, *theirs})

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The whole result in memory, with its generation settings."""
        module = super().load(dtype)
        assert self.path is not None
        if (self.path / "generation_config.json").is_file() and hasattr(module, "generation_config"):
            from transformers import GenerationConfig

            with _quiet():
                module.generation_config = GenerationConfig.from_pretrained(str(self.path))  # type: ignore[assignment]
        return module

    def tokenizer(self) -> Any:
        if self._original is not None:
            return self._original.tokenizer()
        from transformers import AutoTokenizer

        with _quiet():
            try:
                return AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise UserError(
                    f"{self.path} has no tokenizer that can be read ({_short(error)}): copy the original's tokenizer files into it"
                ) from error

    def companions(self) -> list[Path]:
        return []

    def hashes(self) -> dict[str, str]:
        assert self.path is not None
        name = "config.json" if self._original is None else "laconic.json"
        return {file: sha256_of(self.path / file) for file in sorted({info.file for info in self.stored.values()} | {name})}


def _manifest(path: Path) -> tuple[str | None, dict[str, Any], dict[str, Shape], dict[str, Any]]:
    """(factory or None, forms, shapes that were cut, placed parts) of a folder; UserError where it is none of ours."""
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; give one that laconic compress wrote")
    if not is_artifact(path):
        raise UserError(f"{path} was not written by laconic: give a folder that laconic compress wrote")
    if (path / "laconic.json").is_file():
        found = _json(path / "laconic.json")
        if "vectors" in found:
            raise UserError(f"{path} holds vectors and no model: laconic.load opens it, and laconic measure says what they are worth")
        factory = found.get("factory")
        if not isinstance(factory, str):
            raise UserError(f"{path}/laconic.json does not name the model's factory: take an undamaged copy of it")
    else:
        factory, found = None, _json(path / "config.json")["quantization_config"]
    written = found.get("format")
    if written != FORMAT:
        raise UserError(f"{path} was written in format {written}, this version of laconic reads format {FORMAT}: update laconic")
    forms = found.get("forms")
    if not isinstance(forms, dict) or not all(isinstance(form, dict) and "form" in form for form in forms.values()):
        raise UserError(f"{path} does not say how its tensors are held: take an undamaged copy of it")
    return factory, forms, {name: tuple(shape) for name, shape in found.get("shapes", {}).items()}, found.get("placed", {})


def stream(path: str | Path, *, limit: int | None = None) -> Artifact:
    """The result as a source, for a walk that holds one block at a time; an elastic one cut to `limit` bytes."""
    return Artifact(Path(path).expanduser(), limit)


def round_inputs(model: nn.Module, bits: int) -> str:
    """From now on held layers round their inputs to `bits` as they come, where their forms have such a product: what changed, as a
    sentence. UserError where nothing can."""
    if bits != 8:
        raise UserError(f"inputs={bits}: products round their inputs to 8 bits or not at all; give 8, or leave it out")
    held = [layer for layer in model.modules() if isinstance(layer, Held) and not layer.kind.startswith("Embedding")]
    done = sum([layer.round_inputs(bits) for layer in held])
    if not done:
        raise UserError(
            "no matrix of this model is held in grouped codes, and only their products can round inputs to 8 bits: leave inputs out"
        )
    rest = f"; {len(held) - done} are held in forms without such a product and take inputs as they are" if done < len(held) else ""
    return f"{done} of {len(held)} held layers round their inputs to {bits} bits{rest}"


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    thaw: bool = False,
    limit: int | None = None,
    inputs: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The result as a module in eval mode; what no form holds takes `dtype`. thaw: compute with dense copies in `dtype` (fast, large);
    limit: an elastic result cut to so many bytes; inputs: 8 lets products round their inputs to 8 bits, which `log` is told."""
    if thaw and inputs is not None:
        raise UserError("thaw holds dense copies, whose products take inputs as they are: leave out thaw or inputs")
    module = stream(path, limit=limit).load(dtype)
    if inputs is not None:
        log(round_inputs(module, inputs))
    if thaw:
        thawed(module, dtype)
    return module


def thawed(module: nn.Module, dtype: torch.dtype, which: Callable[[Held], bool] = lambda layer: True) -> None:
    """From now on held layers, all or those of a kind, compute with dense copies in `dtype`; a tied matrix has one."""
    first: dict[int, Held] = {}
    for layer in module.modules():
        if isinstance(layer, Held) and which(layer):
            if (same := first.setdefault(id(layer.weight), layer)) is layer:
                layer.thaw(dtype)
            else:
                layer._copy = same._copy


def load_any(
    spec: str | Path | nn.Module | None,
    *,
    dtype: torch.dtype = torch.float32,
    default: Path | None = None,
    limit: int | None = None,
    inputs: int | None = None,
) -> nn.Module:
    """An original or a result as a module in memory."""
    if isinstance(spec, (str, Path)) and spec and is_artifact(spec):
        return load(spec, dtype=dtype, limit=limit, inputs=inputs)
    return open_model(spec, default=default).load(dtype)


def verify_hashes(path: str | Path) -> dict[str, str]:
    """Compare every file with its sha256 in certificate.json; -> the hashes. UserError names the first that is missing or differs."""
    folder = Path(path)
    if not (folder / "certificate.json").is_file():
        raise UserError(f"{folder} has no certificate.json: give a folder that laconic compress finished")
    files = _json(folder / "certificate.json").get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder}/certificate.json lists no files: take an undamaged copy of it")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its certificate lists: take a complete copy, or write the folder again")
        if (found := sha256_of(folder / name)) != expected:
            raise UserError(
                f"{folder / name} is not what was written (sha256 {found[:12]}, certificate {expected[:12]}): take an undamaged copy"
            )
    return dict(files)


def bytes_of(path: str | Path) -> int:
    """Stored bytes of all tensors of a folder, headers not counted."""
    return sum(info.stop - info.start for info in (*_headers(Path(path)).values(), *_beside(Path(path)).values()))


def file_bytes_of(path: str | Path) -> int:
    """Bytes of the weight files of a folder, headers included."""
    folder = Path(path)
    return sum((folder / file).stat().st_size for file in {info.file for info in (*_headers(folder).values(), *_beside(folder).values())})


def _beside(folder: Path) -> dict[str, TensorInfo]:
    return header(folder / PLACED) if (folder / PLACED).is_file() else {}


def decoder_of(path: str | Path) -> tuple[str, dict[str, Tensor]] | None:
    """How a result is decoded: the decoder in written form, and the tensors of its parts by dotted name; None where nothing is said."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return None
    method = (_json(folder / "config.json").get("quantization_config") or {}).get("decoder")
    if method is None:
        return None
    if not (folder / PLACED).is_file():
        raise UserError(f"{folder} lacks {PLACED}, which its decoder {method} needs: take a complete copy of the folder")
    return str(method), {name: read_stored(folder, info) for name, info in _beside(folder).items()}


def config_with(config: Path, forms: Mapping[str, Any]) -> bytes:
    """The original's config.json with the forms in it: what is to be written beside the weights."""
    found = _json(config)
    found["quantization_config"] = {"quant_method": "laconic", "format": FORMAT, "forms": dict(sorted(forms.items()))}
    return (json.dumps(found, indent=2) + "\n").encode()


def manifest_with(factory: str, forms: Mapping[str, Any]) -> bytes:
    """laconic.json for the result of a factory."""
    return (json.dumps({"factory": factory, "format": FORMAT, "forms": dict(sorted(forms.items()))}, indent=2) + "\n").encode()
