"""Kernels for a GPU, in Triton: products with matrices as they are stored, attention over codes and over blocks, the Hadamard transform.

`load` puts them in the place of torch's operations where `torch.ops.laconic` has the operator, and tells `kernels.attention` of the one
that reads a cache as it is held; it does nothing where they cannot run: there has to be a GPU of NVIDIA's (compute capability 8.0 or
later), triton, and a torch that lets an implementation be exchanged. Triton is
imported with the first product on a GPU. A kernel is used once it has given what the reference gives on a trial there; one that does not is
named in a warning and left out."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from laconic.kernels.attention import ELSEWHERE, Part, attended_here
from laconic.kernels.blocks import block_attention as reference_blocks
from laconic.kernels.hadamard import reference_hadamard, reference_unhadamard
from laconic.kernels.linear import _any_dense, _any_linear
from laconic.kernels.lookup import _any_linear as _any_lookup
from laconic.kernels.lookup import _known_dense
from laconic.kernels.place import on

# operators of torch.ops.laconic, and what torch's operations make of them
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "grouped_linear": _any_linear,
    "grouped_dense": _any_dense,
    "lookup_linear": _any_lookup,
    "lookup_dense": _known_dense,
    "hadamard": reference_hadamard,
    "unhadamard": reference_unhadamard,
}
# those of them that are differentiated
DIFFERENTIATED = ("grouped_linear", "lookup_linear", "hadamard", "unhadamard")
# a registration ends with its library
_REGISTERED: list[torch.library.Library] = []


def possible() -> bool:
    """Whether kernels can be compiled and put in place here, and LACONIC_KERNELS does not choose torch alone."""
    if os.environ.get("LACONIC_KERNELS") == "reference":
        return False
    if not torch.cuda.is_available() or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and "allow_override" in inspect.signature(torch.library.Library.impl).parameters


@lru_cache(maxsize=1)
def load() -> bool:
    """From now on operators on GPUs are computed by kernels; whether that is so. What follows the first call changes nothing."""
    if not possible():
        return False
    register("CUDA", trusted)
    ELSEWHERE["cuda"] = held_attention
    return True


def register(kind: str, allowed: Callable[[str], bool]) -> None:
    """Puts kernels in the place of what computes the operators on a kind of device, in torch's words; allowed: asked at each call."""
    library = torch.library.Library("laconic", "IMPL")
    _REGISTERED.append(library)
    with warnings.catch_warnings():
        # of an implementation in the place of another
        warnings.simplefilter("ignore")
        for name, reference in OPERATORS.items():
            library.impl(name, _below(name, reference, kind.lower(), allowed), kind, allow_override=True)
        for name in DIFFERENTIATED:
            library.impl(name, _above(getattr(torch.ops.laconic, name), OPERATORS[name]), f"Autograd{kind}", allow_override=True)


def _below(name: str, reference: Callable[..., Tensor], kind: str, allowed: Callable[[str], bool]) -> Callable[..., Tensor]:
    """An operator on a device."""

    def chosen(first: Tensor, *args: Any, **words: Any) -> Tensor:
        if first.device.type != kind or not allowed(name):
            return reference(first, *args, **words)
        module = "hadamard" if "hadamard" in name else "linear"
        found: Tensor = getattr(import_module(f"laconic.kernels.gpu.{module}"), name)(first, *args, **words)
        return found

    return chosen


def _above(operator: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator where gradients are kept: made of torch's operations if something is differentiated."""

    def chosen(*args: Any, **words: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in args):
            return reference(*args, **words)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **words)

    return chosen


@lru_cache(maxsize=16)
def trusted(name: str) -> bool:
    """Whether a kernel is equal to its reference on a trial on this GPU; said where it is not."""
    if not possible():
        return False
    try:
        with torch.inference_mode(False), torch.no_grad(), on("cpu"):
            wrong: str | None = getattr(import_module("laconic.kernels.gpu.trials"), name)(torch.device("cuda"))
    # whatever a compiler or a driver may say: the reference is there
    except Exception as error:
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if wrong is not None:
        warnings.warn(f"the kernel {name} is not used on this GPU, torch computes in its place ({wrong})", stacklevel=2)
    return wrong is None


def held_attention(
    query: Tensor, keys: Sequence[Part], values: Sequence[Part], mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`kernels.attention.held_attention`, by the kernel on a GPU that has it."""
    if trusted("held_attention"):
        found: Tensor = import_module("laconic.kernels.gpu.attention").held_attention(query, keys, values, mask, scale)
        return found
    return attended_here(query, keys, values, mask, scale)


def block_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int, scale: float | None = None) -> Tensor:
    """`kernels.blocks.block_attention`, by the kernel on a GPU that has it."""
    if query.is_cuda and trusted("block_attention"):
        found: Tensor = import_module("laconic.kernels.gpu.attention").block_attention(query, key, value, keep, block, scale)
        return found
    return reference_blocks(query, key, value, keep, block, scale)
