"""Rows of a matrix in clusters, each with a codebook of its own: b-bit codes name values of the table of their row's cluster.

Stored: codes (n, ceil(m b / 8)) uint8, the rows of one cluster one after another; tables (g, 2^b) bf16, rising; member (n,) uint8, the
cluster of each row, where there is more than one. w[i, j] = tables[member[i], code[i, j]].
Bits per weight: b + 16 g 2^b / (n m) + 8 / m.  A permutation of the rows that the next layer takes in would save the last term, 0.002 bits
of a row of 4,096; but not every row can be moved (the residual stream has one order for all), and a byte says it for any.
Sibling: quantize.grid.levels (one table for a matrix, scales for groups of a row)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Coded, Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import through
from laconic.kernels.levels import Levels
from laconic.kernels.lookup import lookup_linear

# how far from its level, in levels, a weight may begin
INSIDE = 0.45


class Clustered(Packed):
    """A matrix view of `shape` in codes of `bits`."""

    form = "quantize.grid.clusters.Clustered"
    codes: Tensor
    tables: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int, codes: Tensor, tables: Tensor, member: Tensor | None) -> None:
        super().__init__()
        self.shape, self.bits = tuple(shape), bits
        self.register_buffer("codes", codes)
        self.register_buffer("tables", tables.to(torch.bfloat16))
        self.register_buffer("member", member)

    member: Tensor | None

    @classmethod
    def of(cls, shape: tuple[int, ...], codes: Tensor, tables: Tensor, member: Tensor) -> Self:
        """From codes (n, m) uint8, tables (g, 2^b) and member (n,), all by the matrix's own rows."""
        bits = int(tables.shape[1]).bit_length() - 1
        order = member.argsort(stable=True)
        return cls(shape, bits, pack(codes[order], bits), tables, member.to(torch.uint8) if len(tables) > 1 else None)

    @staticmethod
    def bytes_of(n: int, m: int, bits: int, groups: int) -> int:
        """Stored bytes of an (n, m) matrix."""
        return n * packed_width(m, bits) + 2 * groups * 2**bits + (n if groups > 1 else 0)

    def cluster(self) -> Tensor:
        """(n,) the cluster of each row."""
        return self.codes.new_zeros(self.matrix[0], dtype=torch.int64) if self.member is None else self.member.long()

    def plain(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Codes (rows, m) uint8 and the cluster (rows,) of the chosen rows."""
        member = self.cluster()
        # where each row stands among those that are stored
        place = member.argsort(stable=True).argsort()
        return unpack(self.codes[place[index]], self.bits, self.matrix[1]), member[index]

    def rows(self, index: Tensor | slice) -> Tensor:
        codes, member = self.plain(index)
        return self.tables.float()[member[:, None], codes.long()]

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        levels, member = Levels.codebook(self.bits, None), self.cluster()
        out, start = [], 0
        for table, count in zip(self.tables, torch.bincount(member, minlength=len(self.tables)).tolist(), strict=True):
            one = torch.ones(count, 1, dtype=torch.bfloat16, device=x.device)
            if count:
                out.append(lookup_linear(x, self.codes[start : start + count], one, None, table, levels))
            start += count
        return torch.cat(out, -1)[..., member.argsort(stable=True).argsort()]

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Mapped(self, target) if way is None else way(self, target)

    def coded(self) -> Coded:
        return Named(self)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "bits": self.bits}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(described["shape"]), described["bits"], tensors["codes"], tensors["tables"], tensors.get("member"))


class Entries(nn.Module):
    """Tables that learn. table (g, 2^b): in sizes of each cluster's own values, so that one rate serves all."""

    unit: Tensor

    def __init__(self, tables: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", tables.square().mean(1, keepdim=True).sqrt().clamp(min=2.0**-100))
        self.table = nn.Parameter(tables / self.unit)

    def forward(self) -> Tensor:
        """Rising, with the values that they are stored with; gradients pass that rounding."""
        wished = self.table * self.unit
        return through(wished, wished.detach().bfloat16().float()).sort(1).values


class Named(Coded):
    """Tables that learn while codes stay, until they are exchanged one weight at a time."""

    codes: Tensor
    member: Tensor

    def __init__(self, held: Clustered) -> None:
        super().__init__()
        self.shape = held.shape
        for name, tensor in zip(("codes", "member"), held.plain(), strict=True):
            self.register_buffer(name, tensor.clone())
        self.entries = Entries(held.tables.float())

    def dense(self) -> Tensor:
        return self.entries()[self.member[:, None], self.codes.long()].reshape(self.shape)  # type: ignore[no-any-return]

    def groups(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, 1)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        tables, member = self.entries(), self.member[index // self.matrix[1]]
        codes = member.new_zeros(len(index))
        for cluster, table in enumerate(tables.detach()):
            own = member == cluster
            codes[own] = torch.bucketize(wished.detach()[own, 0], (table[1:] + table[:-1]) / 2)
        return codes, tables[member, codes][:, None]

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.codes.view(-1)[index] = codes.to(torch.uint8)

    def harden(self) -> Clustered:
        with torch.no_grad():
            return Clustered.of(self.shape, self.codes, self.entries(), self.member)


class _Neighbours(torch.autograd.Function):
    """Values of a table at whole positions. A position's gradient is the value's times the distance to the neighbour on that side to which
    a step against the gradient would go; at an end of the table there is none."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, tables: Tensor, member: Tensor) -> Tensor:  # type: ignore[override]
        top = tables.shape[1] - 1
        at = position.round().clamp(0, top).long()
        ctx.save_for_backward(at, tables, member)
        return tables[member[:, None], at]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        at, tables, member = ctx.saved_tensors
        top, rows = tables.shape[1] - 1, member[:, None]
        here = tables[rows, at]
        apart = torch.where(grad > 0, here - tables[rows, (at - 1).clamp(min=0)], tables[rows, (at + 1).clamp(max=top)] - here)
        flat = torch.zeros_like(tables).reshape(-1).index_add_(0, (rows * (top + 1) + at).reshape(-1), grad.reshape(-1))
        return grad * apart, flat.reshape(tables.shape), None


class Mapped(Soft):
    """Codes and tables that are learned. position (n, m): where each weight stands among the levels of its cluster, in levels; the code is
    the nearest whole number. A step moves a code by one level at most."""

    member: Tensor
    last: Tensor

    def __init__(self, held: Clustered, target: Tensor) -> None:
        super().__init__()
        self.shape, self.top = held.shape, 2**held.bits - 1
        codes, member = held.plain()
        tables = held.tables.float()
        self.entries = Entries(tables)
        at, rows = codes.long(), member[:, None]
        here = tables[rows, at]
        away = target.reshape(held.matrix).float() - here
        up, down = tables[rows, (at + 1).clamp(max=self.top)] - here, here - tables[rows, (at - 1).clamp(min=0)]
        far = away / torch.where(away > 0, up, down).clamp(min=2.0**-60)
        # at its level, as near to the target as that allows: what is near to the next level moves first
        self.position = nn.Parameter(at + far.clamp(-INSIDE, INSIDE))
        self.register_buffer("member", member)
        self.register_buffer("last", at.float())

    def dense(self) -> Tensor:
        return _Neighbours.apply(self.position, self.entries(), self.member).reshape(self.shape)  # type: ignore[no-untyped-call, no-any-return]

    def settle(self) -> None:
        with torch.no_grad():
            self.position.copy_(torch.maximum(torch.minimum(self.position, self.last + 1), self.last - 1).clamp(0, self.top))
            self.last.copy_(self.position.round())

    def harden(self) -> Clustered:
        with torch.no_grad():
            codes = self.position.round().clamp(0, self.top).to(torch.uint8)
            return Clustered.of(self.shape, codes, self.entries(), self.member)
