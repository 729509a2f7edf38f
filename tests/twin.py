"""A second device for tests, `twin`: made of the processor's memory and arithmetic, but as strict as a GPU. A tensor of it and one of the
processor's cannot meet in one operation, and nothing but torch reads its memory. `started()` before the first use, once in a process."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "twin"
# operations that take tensors of two devices
MOVES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
_kept: list[Any] = []


class OnTwin(torch.Tensor):
    """A tensor of the device; `own` holds its numbers."""

    own: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnTwin:
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, own.size(), strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, layout=own.layout,
                device=torch.device(NAME, 0), requires_grad=False,
            )  # fmt: skip
        made.own = own
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "laconic":
            # our own operations: what is registered for GPUs
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return _run(op, *args, **(kwargs or {}))

    # what torch does for its own tensors only

    def tolist(self) -> Any:
        return self.own.tolist()

    def new_tensor(self, *args: Any, **kwargs: Any) -> OnTwin:  # type: ignore[override]
        return OnTwin(self.own.new_tensor(*args, **kwargs))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.own[tree.tree_map(_own, index)] = _own(value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnTwin({self.own})"


def _own(value: Any) -> Any:
    return value.own if isinstance(value, OnTwin) else value


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op._schema.name
    given, shape = tree.tree_flatten((args, kwargs))
    ours = {id(value.own): value for value in given if isinstance(value, OnTwin)}
    foreign = [value for value in given if isinstance(value, torch.Tensor) and not isinstance(value, OnTwin)]
    if ours and name not in MOVES and any(value.dim() for value in foreign):
        raise RuntimeError(f"{name}: tensors of two devices")
    asked = [value.type for value in given if isinstance(value, torch.device)]
    plain = [torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else _own(value) for value in given]
    inner, words = tree.tree_unflatten(plain, shape)
    out = op(*inner, **words)
    if name == "aten::copy_":
        return args[0]
    if not (NAME in asked if asked else bool(ours)):
        return out

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return ours[id(value)] if id(value) in ours else OnTwin(value)

    return tree.tree_map(wrapped, out)


def started() -> str:
    """The device's name, once torch knows it."""
    if not _kept:
        _setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, "PrivateUse1")
        _kept.append(library)
    return NAME
