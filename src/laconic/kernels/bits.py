"""Dense bit packing: codes of 1 to 16 bits in bytes, little-endian within a row, rows byte-aligned so that any row can be read alone."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(m: int, bits: int) -> int:
    """Bytes of one row of m codes."""
    return -(-m * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (n, m) whole numbers, each below 2^bits -> (n, ceil(m * bits / 8)) uint8. Code i of a row fills bits i*bits .. (i+1)*bits."""
    n, m = codes.shape
    if bits > 8:
        places = torch.arange(bits, dtype=torch.int32, device=codes.device)
        single = codes.to(torch.int32)[..., None].bitwise_right_shift(places).bitwise_and_(1)
        return pack(single.to(torch.uint8).reshape(n, m * bits), 1)
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -m % 8))
    runs = padded.reshape(n, -1, 8)
    # eight codes of b bits are b whole bytes: build them in one 64-bit word
    word = torch.zeros(n, runs.shape[1], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= runs[:, :, i].to(torch.int64) << (i * bits)
    out = word.view(torch.uint8).reshape(n, runs.shape[1], 8)[:, :, :bits].reshape(n, -1)
    return out[:, : packed_width(m, bits)].contiguous()


def unpack(stored: Tensor, bits: int, m: int) -> Tensor:
    """The inverse of pack: (n, bytes) uint8 -> (n, m) uint8, or int32 where codes have more than 8 bits."""
    n = stored.shape[0]
    if bits > 8:
        single = unpack(stored, 1, m * bits).reshape(n, m, bits).to(torch.int32)
        return single.bitwise_left_shift(torch.arange(bits, dtype=torch.int32, device=stored.device)).sum(2, dtype=torch.int32)
    if bits == 8:
        return stored[:, :m]
    if bits in (1, 2, 4):
        per, mask = 8 // bits, (1 << bits) - 1
        out = stored.new_empty(n, stored.shape[1], per)
        for i in range(per):
            out[:, :, i] = (stored >> (i * bits)) & mask
        return out.reshape(n, -1)[:, :m]
    runs = -(-m // 8)
    padded = torch.nn.functional.pad(stored, (0, runs * bits - stored.shape[1])).reshape(n, runs, bits)
    word = torch.nn.functional.pad(padded, (0, 8 - bits)).contiguous().view(torch.int64).reshape(n, runs)
    out = stored.new_empty(n, runs, 8)
    for i in range(8):
        out[:, :, i] = (word >> (i * bits)) & ((1 << bits) - 1)
    return out.reshape(n, -1)[:, :m]
