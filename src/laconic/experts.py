"""Experts of a mixture as matrices of their own, as checkpoints store them; transformers holds all experts of a layer in two fused tensors.

Each expert becomes a sub-module with gate_proj, up_proj and down_proj, so that every matrix is a site like any other: with its own
statistics, level and form. The experts' forward goes through transformers' registry of expert implementations."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from laconic.models import TensorInfo

NAME = "laconic"
FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")


def split_experts(model: nn.Module) -> None:
    """Replaces the fused tensors of every module of experts: one sub-module for each expert, on the device of the fused tensors and without
    their values. Modules of another layout (interleaved, transposed, with biases) stay as they are."""
    for inner in model.modules():
        fused = getattr(inner, "gate_up_proj", None)
        if not isinstance(fused, nn.Parameter) or fused.dim() != 3 or not getattr(inner, "has_gate", False):
            continue
        experts: Any = inner
        if experts.is_transposed or experts.has_bias or not experts.is_concatenated or experts.has_post_expert_norm:
            continue
        _register()
        count, twice, d = fused.shape
        f = twice // 2
        for e in range(count):
            expert = nn.Module()
            for name, n, m in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
                matrix = nn.Linear(m, n, bias=False, device="meta").to_empty(device=fused.device)
                expert.add_module(name, matrix.to(fused.dtype).requires_grad_(fused.requires_grad))
            experts.add_module(str(e), expert)
        del experts.gate_up_proj, experts.down_proj
        # transformers would initialize what is gone
        experts._is_hf_initialized = True
        # a config of its own: the model's may be used to build another one
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation_internal = NAME


def one_by_one(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum over each token's experts, expert by expert. hidden_states (t, d), top_k_index and top_k_weights (t, k) -> (t, d).
    An expert that no token chose is not run."""
    out = torch.zeros_like(hidden_states)
    chosen = top_k_index.flatten()
    # sorted once, the places of an expert's tokens lie together
    places = chosen.argsort(stable=True)
    at, counts = 0, chosen.bincount().tolist()
    for e, count in enumerate(counts):
        if not count:
            continue
        place = places[at : at + count]
        at += count
        token = place // top_k_index.shape[1]
        expert = self.get_submodule(str(e))
        x = hidden_states[token]
        inner = self._apply_gate(torch.cat((expert.gate_proj(x), expert.up_proj(x)), -1))
        out.index_add_(0, token, (expert.down_proj(inner) * top_k_weights.flatten()[place, None]).to(out.dtype))
    return out


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, one_by_one)


def single(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Stored tensors with those of fused experts taken apart: an expert's rows lie together, so each matrix is a range of bytes."""
    found: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        match = FUSED.match(name)
        if match is None or len(info.shape) != 3:
            found[name] = info
            continue
        count, n, m = info.shape
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        size = (info.stop - info.start) // (count * len(parts))
        for i in range(count * len(parts)):
            e, part = divmod(i, len(parts))
            start = info.start + i * size
            found[f"{match[1]}.{e}.{parts[part]}.weight"] = info._replace(shape=(n // len(parts), m), start=start, stop=start + size)
    return found
