"""Mamba's mixer with its scan laid open: the same function, in steps that are modules of their own.

Gu & Dao 2023, arXiv:2312.00752, section 3, as transformers computes it; the form that MambaQuant (Xu et al. 2025, arXiv:2501.13484) needs:
    h[t] = exp(D[t] A) h[t-1] + D[t] B[t] x[t],   y[t] = h[t] C[t] + d x[t],   out = W_out (y z sigmoid(s z))
The projection of steps runs as a module, so that it can be held and observed like any other; the two operands of h C pass through `state`
and `readout`, which may turn them (Hadamard over the states of a channel, both alike, so that their product stays) and round them, each
by one scale a token, that of h over all channels. `gate_scale` s (channels,) is stored where the gate's projection has taken 1 / s in;
without it s is 1. The scan runs in fp32, some tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.part import Part, adopt
from laconic.kernels.hadamard import hadamard
from laconic.kernels.inputs import rounded
from laconic.kernels.scan import recurrence

# tokens of the scan whose states are in memory at once
CHUNK = 64


class Operand(nn.Module):
    """An operand of the product h C on its way in, its last axis that of the states; a token is its last `axes` axes."""

    def __init__(self, axes: int, turned: bool, bits: int | None) -> None:
        super().__init__()
        self.axes, self.turned, self.bits = axes, turned, bits

    def forward(self, x: Tensor) -> Tensor:
        x = hadamard(x) if self.turned else x
        return x if self.bits is None else rounded(x, self.bits, self.axes)


class Mixer(Part):
    """In the place of transformers' MambaMixer. bits: of both operands of h C, None leaves them as they are."""

    part = "quantize.rotate.mixer.Mixer"
    # what is taken over
    in_proj: nn.Module
    conv1d: nn.Conv1d
    act: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Module
    out_proj: nn.Module
    A_log: Tensor
    D: Tensor
    layer_idx: int
    time_step_rank: int
    ssm_state_size: int
    conv_kernel_size: int
    gate_scale: Tensor | None

    def __init__(self, *, scaled: bool = False, turned: bool = False, bits: int | None = None) -> None:
        super().__init__()
        self.scaled, self.turned, self.bits = scaled, turned, bits
        self.state, self.readout = Operand(2, turned, bits), Operand(1, turned, bits)
        self.register_buffer("gate_scale", None)

    def over(self, module: nn.Module) -> None:
        adopt(self, module)
        for name in ("layer_idx", "time_step_rank", "ssm_state_size", "conv_kernel_size", "layer_type"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        if self.scaled:
            self.gate_scale = torch.ones_like(self.D, requires_grad=False)

    def exact(self) -> Mixer:
        return Mixer(scaled=self.scaled, turned=self.turned)

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "scaled": self.scaled, "turned": self.turned, "bits": self.bits}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(scaled=described["scaled"], turned=described["turned"], bits=described["bits"])

    def forward(self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states (b, t, d) -> (b, t, d); tokens that the mask (b, t) leaves out leave no trace."""
        length, dtype = hidden_states.shape[1], hidden_states.dtype
        states = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
        x, gate = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, -1)
        x = x.transpose(1, 2)
        if cache_params is not None:
            # with what the convolution must see of the tokens before these
            x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        conv = self.conv1d
        past = F.conv1d(x, conv.weight, conv.bias, padding=self.conv_kernel_size - 1, groups=x.shape[1])[:, :, : x.shape[-1]]
        x = _masked(self.act(past[:, :, -length:]).transpose(1, 2), attention_mask)
        low, b, c = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
        start = states.float() if states is not None and length == 1 else None
        y, last = self._scan(x.float(), F.softplus(self.dt_proj(low).float()), b.float(), c.float(), start)
        if cache_params is not None:
            cache_params.update_recurrent_state(last.to(dtype), self.layer_idx)
        gate = gate.float()
        opened = gate * torch.sigmoid(gate if self.gate_scale is None else self.gate_scale.float() * gate)
        out: Tensor = self.out_proj((y * opened).to(dtype))
        return out

    def _scan(self, x: Tensor, step: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, step (b, t, d), b, c (b, t, n) -> y (b, t, d) and the last states (b, d, n)."""
        rate = -torch.exp(self.A_log.float())
        last = x.new_zeros(x.shape[0], x.shape[2], rate.shape[1]) if start is None else start
        pieces = []
        for xs, steps, bs, cs in zip(*(v.transpose(0, 1).split(CHUNK) for v in (x, step, b, c)), strict=True):
            drive = (steps * xs)[..., None] * bs[:, :, None]
            held = recurrence(torch.exp(steps[..., None] * rate), drive, last)
            last = held[-1]
            pieces.append((self.state(held) @ self.readout(cs)[..., None])[..., 0])
        return torch.cat(pieces).transpose(0, 1) + self.D.float() * x, last


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[:, -x.shape[1] :, None]).to(x.dtype)
