"""transformers reads laconic's folders once `import laconic` has run: `AutoModelForCausalLM.from_pretrained(OUT)`.

Imports neither torch nor transformers by itself: a hook registers the format at the moment transformers' table of formats is loaded."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"


def on_import() -> None:
    """Register now where transformers' table is loaded, else when it will be."""
    if hasattr(sys.modules.get(TABLE), "register_quantizer"):
        _try_register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finds nothing itself; lets the table be found as usual and registers once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                self._then_register(spec)
                return spec
        return None

    def _then_register(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _try_register()

        loader.exec_module = exec_module


def _try_register() -> None:
    # someone who only wants transformers must get it, whatever its version
    try:
        register()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        warnings.warn(f"transformers cannot read laconic's folders ({type(error).__name__}: {error}); laconic.load can", stacklevel=2)


def register() -> None:
    """Enter `quant_method: laconic` into transformers' tables; a second call does nothing."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "laconic" in AUTO_QUANTIZER_MAPPING:
        return

    class LaconicConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """The `quantization_config` of a folder: its format, the form of every held tensor, and parts that stand for modules."""

        def __init__(
            self,
            forms: dict[str, Any] | None = None,
            format: int = 1,
            quant_method: str = "laconic",
            decoder: str | None = None,
            shapes: dict[str, list[int]] | None = None,
            placed: dict[str, Any] | None = None,
        ) -> None:
            self.quant_method: Any = quant_method
            self.format, self.forms, self.decoder, self.shapes, self.placed = format, forms or {}, decoder, shapes or {}, placed or {}

    class LaconicQuantizer(HfQuantizer):  # type: ignore[misc]
        """Puts Held layers on meta into the model; transformers then loads their stored tensors by name, like any others."""

        requires_calibration = True
        is_trainable = False

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any) -> None:
            config: Any = self.quantization_config
            self.alias = _swap(model, config.forms, config.shapes, checkpoint_files or ())
            _place(model, config.placed, checkpoint_files or ())

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _finish(model, self.alias)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            return _unmerged(weight_conversions)

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
            # a tied head is saved once, under the name it was stored with
            doubles = tuple(f"{path}.weight." for path in self.alias)
            return {name: value for name, value in model.state_dict().items() if not name.startswith(doubles)}, {}

    register_quantization_config("laconic")(LaconicConfig)
    register_quantizer("laconic")(LaconicQuantizer)


def _unmerged(conversions: list[Any]) -> list[Any]:
    """transformers' conversions without those that merge experts, whose matrices stay apart; the names that they gave are given still."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    kept = [found for found in conversions if not (isinstance(found, WeightConverter) and "experts" in str(found.target_patterns))]
    if len(kept) == len(conversions):
        return conversions
    names = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    return kept + [WeightRenaming(rf"\.experts\.(\d+)\.{old}\.", rf".experts.\1.{new}.") for old, new in names]


def _swap(model: Any, forms: dict[str, Any], shapes: dict[str, list[int]], files: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """The model without the channels that were cut, and Held layers on meta for all forms. -> layers that only share a form: path -> (the
    layer that was there, path of the form's owner); they wait as empty modules, so that nothing asks for their tensors."""
    from pathlib import Path

    from torch import Tensor, nn

    from laconic.artifact import blank, by_form, holdable, put
    from laconic.core.errors import UserError
    from laconic.core.packed import Held
    from laconic.experts import split_experts
    from laconic.models import header, stored_name
    from laconic.narrow import narrow

    if beside := [name for name in forms if not name.endswith(".weight")]:
        raise UserError(f"{beside[0]} is held in slices, which transformers does not read: load the folder with laconic.load")
    split_experts(model)
    smaller = {name: tuple(shape) for name, shape in shapes.items()}
    narrow(model, lambda name: smaller.get(stored_name(name, smaller) or ""))
    infos = {name: info for file in files for name, info in header(Path(file)).items()}
    held = {full for keys in by_form(infos, forms).values() for full in keys.values()}
    known = {*forms, *(name for name in infos if name not in held)}
    made = blank(forms, infos, Path(files[0]).parent if files else Path())
    owners: dict[str, str] = {}
    layers = {path: layer for path, layer in model.named_modules() if holdable(layer)}
    for path, layer in layers.items():
        stored = stored_name(f"{path}.weight", known)
        if stored in made and stored not in owners:
            owners[stored] = path
            put(model, path, Held(made[stored], layer, layer.bias if isinstance(getattr(layer, "bias", None), Tensor) else None))
    waiting: dict[str, tuple[Any, str]] = {}
    for target, source in list(model.all_tied_weights_keys.items()):
        paths = [name.removesuffix(".weight") for name in (target, source)]
        owner = next((path for path in paths if path in owners.values()), None)
        if owner is None:
            continue
        del model.all_tied_weights_keys[target]
        other = paths[1 - paths.index(owner)]
        layer = layers[other]
        empty = nn.Module()
        empty.register_parameter("bias", getattr(layer, "bias", None))
        put(model, other, empty)
        waiting[other] = (layer, owner)
    return waiting


def _place(model: Any, placed: dict[str, Any], files: Sequence[str]) -> None:
    """Parts in the place of modules that are gone."""
    from pathlib import Path

    from laconic.artifact import parts, stand

    for path, part in parts(placed, Path(files[0]).parent if files else Path()).items():
        stand(model, path, part)


def _finish(model: Any, waiting: dict[str, tuple[Any, str]]) -> None:
    """Puts the waiting layers back, each with its owner's form."""
    from laconic.artifact import put
    from laconic.core.packed import Held

    for path, (layer, owner) in waiting.items():
        put(model, path, Held(model.get_submodule(owner).weight, layer, model.get_submodule(path).bias))
    for layer in model.modules():
        if isinstance(layer, Held):
            layer.dtype = model.dtype
