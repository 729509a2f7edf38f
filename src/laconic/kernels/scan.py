"""A linear recurrence with a decay for each step and entry: h[t] = decay[t] * h[t - 1] + drive[t], time along the first axis.

One step is one fused multiply and add, forward and back, and its gradient keeps nothing but what was given and the states themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
        states = _run(decay, drive, start)
        ctx.save_for_backward(decay, states, start)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, start = ctx.saved_tensors
        flow = grads[0].clone()
        for t in range(flow.shape[0] - 1, 0, -1):
            flow[t - 1].addcmul_(decay[t], flow[t])
        before = torch.cat([start[None], states[:-1]])
        return flow * before, flow, decay[0] * flow[0]


def _run(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    states = torch.empty_like(drive)
    last = start
    for t in range(drive.shape[0]):
        last = torch.addcmul(drive[t], decay[t], last, out=states[t])
    return states


def recurrence(decay: Tensor, drive: Tensor, start: Tensor) -> Tensor:
    """decay, drive (t, ...), start (...) -> all states (t, ...)."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (decay, drive, start)):
        states: Tensor = _Recurrence.apply(decay, drive, start)  # type: ignore[no-untyped-call]
        return states
    return _run(decay, drive, start)
