"""Keys and values in codes with scales along the channels of each token: what stores of such codes have in common.

A new token is coded by itself, so what is kept only grows at its end. A half is kept as `codes.<channels>` (bytes do not tell how many
channels they hold, their name does) and as one tensor of scales under a name of the store's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from laconic.core.state import Ragged
from laconic.kernels.attention import Grouped
from laconic.kernels.bits import pack

HALVES = ("keys", "values")
Kept = Mapping[str, Ragged]


def joined(kept: Kept | None, new: tuple[Ragged, ...], coded: Callable[[Tensor], tuple[Tensor, Tensor]], bits: int, scales: str) -> Kept:
    """What is kept with new tokens behind it. coded: x (b, h, t, 1, d) -> codes (b, h, t, 1, d) uint8 and scales (b, h, t, 1, g)."""
    found: dict[str, Ragged] = {}
    for name, fresh in zip(HALVES, new, strict=True):
        codes, scale = coded(fresh.data[..., None, :])
        # the kernel makes its tensors where the codes are
        with codes.device:
            stored = pack(codes.reshape(-1, codes.shape[-1]), bits).reshape(*codes.shape[:-1], -1)
        for part, one in ((f"codes.{fresh.data.shape[-1]}", stored), (scales, scale)):
            rows = Ragged((one,), fresh.lengths)
            had = None if kept is None else kept[f"{name}.{part}"]
            # in rows that are shorter than the others, what follows their end goes
            cut = rows.cut((0,) * len(rows.lengths), rows.lengths)
            found[f"{name}.{part}"] = cut if had is None else had.join(cut)
    return found


def parts(kept: Kept, at: int, scales: str) -> tuple[Ragged, Ragged, int]:
    """Codes, scales and channels of the keys (at = 0) or values (1)."""
    name = next(part for part in kept if part.startswith(f"{HALVES[at]}.codes."))
    return kept[name], kept[f"{HALVES[at]}.{scales}"], int(name.rpartition(".")[2])


def read(held: Callable[[Kept, int], Grouped], kept: Kept | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
    """Both halves dense, what is staged behind what is kept. held: what a half is as the kernels read it."""
    if kept is None:
        return staged
    found = []
    for at in range(len(HALVES)):
        half = held(kept, at)
        one = Ragged((half.dense(),), half.tokens)
        found.append(one.join(staged[at]) if staged else one)
    return tuple(found)
