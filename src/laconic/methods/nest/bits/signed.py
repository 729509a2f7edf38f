"""Signed: one bit for each weight's sign, and a low-rank matrix for its magnitude.

Stored: sign (n, 2 ceil(m / 16)) uint8, set where the weight is not below zero; left (k, n) and right (k, m) in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.packed import Packed
from laconic.kernels.bits import pack, unpack


class Signed(Packed):
    """S * (left.T right), entry by entry, with S of ones and minus ones, (n, m)."""

    form = "nest.bits.signed.Signed"
    sign: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, sign: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.shape = (left.shape[1], right.shape[1])
        self.register_buffer("sign", sign)
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    @classmethod
    def of(cls, positive: Tensor, left: Tensor, right: Tensor) -> Self:
        """positive (n, m) bool; left (n, k) and right (k, m) are rounded to fp16."""
        # rows of whole 16-bit words, so that what lies behind them in a file starts at an even byte
        signs = torch.nn.functional.pad(positive.to(torch.uint8), (0, -positive.shape[1] % 16))
        return cls(pack(signs, 1), left.T.contiguous().to(torch.float16), right.contiguous().to(torch.float16))

    @staticmethod
    def bytes_of(n: int, m: int, rank: int) -> int:
        """Stored bytes of an (n, m) matrix."""
        return 2 * n * -(-m // 16) + 2 * rank * (n + m)

    def rows(self, index: Tensor | slice) -> Tensor:
        size = self.left.T[index].float() @ self.right.float()
        return torch.where(unpack(self.sign[index], 1, self.shape[1]).bool(), size, -size)

    def dense(self) -> Tensor:
        return self.rows(slice(None))

    def describe(self) -> dict[str, Any]:
        return {"form": self.form}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["sign"], tensors["left"], tensors["right"])
