"""What it means that the slices of a group fall together: zeros in their place, and a state dict without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from laconic.core.site import Group


def _state(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict by stored names; `names` maps a stored name to the module's where they differ."""
    other = {own: stored for stored, own in names.items()}
    return {other.get(name, name): value for name, value in model.state_dict().items()}


def masked(model: nn.Module, group: Group, gone: list[int], names: Mapping[str, str] = MappingProxyType({})) -> nn.Module:
    """A copy whose slices of the canonical indices `gone` are zero."""
    new = copy.deepcopy(model)
    state = _state(new, names)
    for member in group.members:
        taken = torch.tensor([j for i in gone for j in member.index(i)], dtype=torch.int64)
        for role, tensor in member.site.tensors.items():
            # a variance of zero would blow up what rounding leaves of the channel
            if role == "weight":
                state[tensor.name].index_fill_(member.stored_axis, taken, 0)
            elif member.axis == 0 and role != "running_var":
                state[tensor.name][taken] = 0
    return new


def removed(model: nn.Module, group: Group, gone: list[int], names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Tensor]:
    """The state dict, by stored names, without the slices of the canonical indices `gone`."""
    state = {name: value.clone() for name, value in _state(model, names).items()}
    for member in group.members:
        taken = {j for i in gone for j in member.index(i)}
        kept = torch.tensor([j for j in range(member.index.width) if j not in taken])
        for role, tensor in member.site.tensors.items():
            if role == "weight":
                state[tensor.name] = state[tensor.name].index_select(member.stored_axis, kept)
            elif member.axis == 0:
                state[tensor.name] = state[tensor.name][kept]
    return state
