"""A module made narrower: parameters and buffers of smaller shapes, and the numbers beside them that repeat a width."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# numbers that a layer keeps beside its weight, and the axis of the weight that each repeats
OWN: Mapping[str, int] = {
    "out_features": 0,
    "in_features": 1,
    "out_channels": 0,
    "num_embeddings": 0,
    "embedding_dim": 1,
    "num_features": 0,
    "num_channels": 0,
    "num_parameters": 0,
    "nx": 0,
    "nf": 1,
}
# numbers that a module keeps of the width that its output projection reads, and of the heads in it
WIDTHS = ("split_size", "embed_dim", "all_head_size", "inner_dim")
HEADS, EACH = ("num_heads", "num_attention_heads"), ("head_dim", "attention_head_size")

Shape = tuple[int, ...]


def narrow(module: nn.Module, shape_of: Callable[[str], Shape | None]) -> nn.Module:
    """Gives every tensor for which shape_of(name) is another shape an empty one of that shape on meta, in place; None leaves it."""
    for path, owner in list(module.named_modules()):
        before: dict[str, Shape] = {}
        for held in (owner._parameters, owner._buffers):
            for leaf, value in list(held.items()):
                wanted = shape_of(f"{path}.{leaf}" if path else leaf) if isinstance(value, Tensor) else None
                if value is None or wanted is None or wanted == tuple(value.shape):
                    continue
                before[leaf] = tuple(value.shape)
                empty = torch.empty(wanted, dtype=value.dtype, device="meta")
                held[leaf] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty  # type: ignore[assignment]
        if before:
            _own(owner, before)
            if "weight" in before and path:
                parent = module.get_submodule(path.rpartition(".")[0])
                _above(parent, owner, before["weight"])
    return module


def _own(owner: Any, before: Mapping[str, Shape]) -> None:
    leaf = "weight" if "weight" in before else next(iter(before))
    old, new = before[leaf], tuple(getattr(owner, leaf).shape)
    if hasattr(owner, "groups"):
        # the rows of a group of a convolution fall together
        owner.groups = owner.groups if owner.groups == 1 else owner.groups * new[0] // old[0]
        owner.in_channels = new[1] * owner.groups
    for name, axis in OWN.items():
        if hasattr(owner, name) and axis < len(new):
            setattr(owner, name, new[axis])
    if hasattr(owner, "normalized_shape"):
        owner.normalized_shape = new


def _above(parent: Any, child: nn.Module, before: Shape) -> None:
    """What a module says of the width that this child of it reads."""
    axis = 0 if hasattr(child, "nx") else 1
    weight: Any = child.weight
    if len(before) != 2 or (old := before[axis]) == (new := weight.shape[axis]):
        return
    for name in WIDTHS:
        if getattr(parent, name, None) == old:
            setattr(parent, name, new)
    each = next((getattr(parent, name) for name in EACH if isinstance(getattr(parent, name, None), int)), 0)
    for name in HEADS:
        if each and getattr(parent, name, None) == old // each:
            setattr(parent, name, new // each)


def narrowed(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy around the same tensors, with these in place of their own, by name in the module: they may be of smaller shapes."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    new = narrow(copy.deepcopy(module, memo), lambda name: tuple(values[name].shape) if name in values else None)
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = new.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value
    return new
