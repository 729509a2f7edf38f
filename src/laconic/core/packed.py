"""How a tensor is held. A Packed is an nn.Module whose buffers are exactly what is stored, so state_dict, devices and compile come for
nothing, and its bytes are counted from those buffers: scales and indices included.

The algebra makes new forms from old: Sum (base plus correction), Product (low rank), Scaled (a factor a column), Joined (slices along an
axis), Transposed, Feeding (inputs are changed first), Dense (kept as it is). What is held in parts (`parts`, `first`) may be cut to its
first ones when it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

# a product with a held matrix makes at most this many dense entries at once (fp32: 64 MB), so that a huge table stays small in memory
CHUNK = 16 * 1024 * 1024


class Read(NamedTuple):
    """What a product with grouped codes reads: codes (n, ceil(m bits / 8)) uint8, scales (n, g) bf16, packed zeros or None; group 0 is the
    whole row; half: zeros are counted in halves; int8: inputs are rounded to 8 bits as they come."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    half: bool
    int8: bool


class Packed(nn.Module, ABC):
    """A tensor of `shape` held in some form. Stored forms are named by their module path below `laconic.methods` or by `core.packed`."""

    form: ClassVar[str]
    shape: tuple[int, ...]
    # what a model that looks at its weight's dtype is told: that of the products
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def dense(self) -> Tensor:
        """The tensor that is represented, fp32, of `shape`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What besides the stored tensors is needed to build it again: a JSON object of numbers, words and nested forms."""

    @classmethod
    @abstractmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The form again, from `describe()` and `tensors()`."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m): the first axis against all others."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        return self.shape[0], width

    @property
    def nbytes(self) -> int:
        """Bytes really stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by dotted name."""
        return dict(self.state_dict())

    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows of the matrix view, fp32 (len(index), m); forms that can do it without touching the others override this."""
        return self.dense().reshape(self.matrix)[index]

    def matmul(self, x: Tensor) -> Tensor:
        """x (..., m) times the transposed matrix view -> (..., n), in x's dtype; dense rows are made a chunk at a time."""
        n, m = self.matrix
        step = max(1, CHUNK // max(m, 1))
        if step >= n:
            return F.linear(x, self.dense().reshape(n, m).to(x.dtype))
        out = x.new_empty(*x.shape[:-1], n)
        for i in range(0, n, step):
            out[..., i : i + step] = F.linear(x, self.rows(slice(i, min(i + step, n))).to(x.dtype))
        return out

    def pixels(self, x: Tensor) -> Tensor | None:
        """x (b, m, ...) times the matrix view at every place -> (b, n, ...): a convolution of 1 x 1; None where the form has no product of
        its own for it."""
        return None

    def line(self) -> Any:
        """The numbers of the matrix view, row after row, as a kernel takes them: a tensor of any shape and dtype, or what a form holds in
        its place (`kernels.sparse.Codes`)."""
        return self.dense()

    @property
    def feed(self) -> Callable[[Tensor], Tensor] | None:
        """What becomes of an input before the product, None for nothing: of x (..., m), `matmul(x)` is the dense matrix with `feed(x)`; of
        a convolution x (b, m, ...). It holds no part of the form."""
        return None

    def round_inputs(self, bits: int) -> bool:
        """From now on products round their inputs to `bits` as they come, where this form, or what it is built of, has such a product;
        whether it has. It is a way to compute: nothing of it is stored, and `dense` and `feed` stay what they are."""
        return False

    def read(self) -> Read | None:
        """What its product reads, where the whole of it is one with grouped codes; None for every other form."""
        return None

    def forward(self) -> Tensor:
        """The dense tensor; a Packed is a module, and this is what it computes."""
        return self.dense()

    @property
    def parts(self) -> int:
        """How many parts it is held in, of which the first few alone stand for the tensor too, more roughly; 1 where there are none."""
        return 1

    def first(self, count: int) -> Packed:
        """The form of its first `count` parts, 1 to `parts` of them: they are the same tensors under the same names. Of slices that are
        joined it is a smaller tensor."""
        return self

    @property
    def as_is(self) -> bool:
        """Whether it holds the tensor's own numbers and nothing else, so that to compute with the form saves nothing."""
        return False

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        """This form as something to learn, beginning with what it holds. target, of `shape`, is the tensor that it stands for: it says how
        near each weight is to its other codes. way: a lesson's own for the form at the bottom; what is built on that form stays. None where
        nothing of a form can be learned."""
        return None

    def coded(self) -> Coded | None:
        """This form as codes that may be exchanged one by one, and numbers that learn; None where it has no codes of its own."""
        return None


class Soft(Packed):
    """A form that is being learned: parameters stand where a stored form has buffers, and `dense()` is differentiable in them. It is never
    stored; what is stored is `harden()`, and as it stands at any step, `dense()` equals `harden().dense()`. One that is relaxed comes to
    that only at the end, and its method's card says so. A `feed` of its own may have parameters too, which learn part by part."""

    form = ""

    @abstractmethod
    def harden(self) -> Packed:
        """The stored form of what has been learned so far."""

    def within(self) -> list[Soft]:
        """The forms being learned that this one is made of, not what those are made of in turn."""
        found: list[Soft] = []
        waiting = list(self.children())
        while waiting:
            module = waiting.pop(0)
            if isinstance(module, Soft):
                found.append(module)
            else:
                waiting += module.children()
        return found

    def penalty(self, done: float) -> Tensor | None:
        """What the form adds to the objective once the share `done` of the steps is behind it: a scalar, None for nothing. By default what
        those within it add."""
        added = [penalty for soft in self.within() if (penalty := soft.penalty(done)) is not None]
        return torch.stack(added).sum() if added else None

    def settle(self) -> None:
        """Called after each step of the optimiser: what the form makes of what that proposed. By default what those within it do."""
        for soft in self.within():
            soft.settle()

    def describe(self) -> dict[str, Any]:
        raise TypeError("a form that is being learned is not stored: harden it first")

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        raise TypeError("a form that is being learned is not stored: harden it first")


class Coded(Soft):
    """A form whose codes stay while its numbers are learned, until they are exchanged. A code stands for a group of weights."""

    @abstractmethod
    def groups(self, matrix: Tensor) -> Tensor:
        """(n, m) -> (groups, width): the weights that each code stands for, zeros where they lie beyond the matrix."""

    @abstractmethod
    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        """The codes (..., s) with which groups `index` (s,) come nearest to wished (s, width), and the weights (s, width) of these."""

    @abstractmethod
    def exchange(self, index: Tensor, codes: Tensor) -> None:
        """Groups `index` (s,) have these codes (..., s) from now on."""


# makes a form at the bottom (codes on a grid) something to learn, given the tensor that it stands for
Way = Callable[[Packed, Tensor], Soft | None]


class Dense(Packed):
    """The tensor itself, in its stored dtype."""

    form = "core.packed.Dense"

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.shape = tuple(value.shape)
        self.register_buffer("value", value)

    value: Tensor

    def dense(self) -> Tensor:
        return self.value.float()

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.value.reshape(self.matrix)[index].float()

    def line(self) -> Tensor:
        return self.value

    @property
    def as_is(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {"form": self.form}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["value"])


class Absent(Packed):
    """A tensor that is gone with the part it belonged to: nothing is stored, and where it is asked for it is zeros."""

    form = "core.packed.Absent"

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def dense(self) -> Tensor:
        return torch.zeros(self.shape)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(described["shape"])


class Product(Packed):
    """left (n, r) times right (r, m): a low-rank matrix. left is held transposed, (r, n), so that both factors' scales run along
    their long side."""

    form = "core.packed.Product"

    def __init__(self, left: Packed, right: Packed) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.shape = (left.matrix[1], right.matrix[1])

    def dense(self) -> Tensor:
        return self.left.dense().T @ self.right.dense()

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.left.dense().T[index] @ self.right.dense()

    def round_inputs(self, bits: int) -> bool:
        return self.right.round_inputs(bits)

    def matmul(self, x: Tensor) -> Tensor:
        return self.right.matmul(x) @ self.left.dense().to(x.dtype)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "left": self.left.describe(), "right": self.right.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(restore(described["left"], below(tensors, "left")), restore(described["right"], below(tensors, "right")))


class Sum(Packed):
    """The sum of several forms of one matrix view: a base and its corrections."""

    form = "core.packed.Sum"

    def __init__(self, *terms: Packed) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.shape = terms[0].shape

    def _terms(self) -> list[Packed]:
        return [term for term in self.terms if isinstance(term, Packed)]

    def dense(self) -> Tensor:
        first, *rest = self._terms()
        total = first.dense()
        for term in rest:
            total = total + term.dense().reshape(total.shape)
        return total

    def rows(self, index: Tensor | slice) -> Tensor:
        first, *rest = self._terms()
        total = first.rows(index)
        for term in rest:
            total = total + term.rows(index)
        return total

    def matmul(self, x: Tensor) -> Tensor:
        first, *rest = self._terms()
        total = first.matmul(x)
        for term in rest:
            total = total + term.matmul(x)
        return total

    def round_inputs(self, bits: int) -> bool:
        return sum(term.round_inputs(bits) for term in self._terms()) > 0

    @property
    def parts(self) -> int:
        return len(self.terms)

    def first(self, count: int) -> Sum:
        return Sum(*self._terms()[:count])

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        base, *rest = self._terms()
        for term in rest:
            target = target - term.dense().reshape(target.shape)
        soft = base.soften(target, way)
        return None if soft is None else SoftSum(soft, rest)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "terms": [term.describe() for term in self._terms()]}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(*[restore(inner, below(tensors, f"terms.{i}")) for i, inner in enumerate(described["terms"])])


class SoftSum(Soft):
    """A Sum whose base is learned; its corrections stay."""

    def __init__(self, base: Soft, rest: Sequence[Packed]) -> None:
        super().__init__()
        self.shape = base.shape
        self.base = base
        self.rest = nn.ModuleList(rest)
        self.register_buffer("fixed", sum((term.dense().reshape(base.shape) for term in rest), torch.zeros(base.shape)))

    fixed: Tensor

    def dense(self) -> Tensor:
        return self.base.dense() + self.fixed

    def harden(self) -> Sum:
        return Sum(self.base.harden(), *[term for term in self.rest if isinstance(term, Packed)])


class Scaled(Packed):
    """`inner` (n, m) with a factor for each column: scale (m,), in its stored dtype."""

    form = "core.packed.Scaled"
    scale: Tensor

    def __init__(self, inner: Packed, scale: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.shape = inner.shape
        self.register_buffer("scale", scale)

    def dense(self) -> Tensor:
        return (self.inner.dense().reshape(self.matrix) * self.scale.float()).reshape(self.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.inner.rows(index) * self.scale.float()

    @property
    def parts(self) -> int:
        return self.inner.parts

    def first(self, count: int) -> Scaled:
        return Scaled(self.inner.first(count), self.scale)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(restore(described["inner"], below(tensors, "inner")), tensors["scale"])


def _apart(value: Tensor, axis: int, runs: int) -> Tensor:
    """The runs of an axis as an axis of their own before it."""
    return value.reshape(*value.shape[:axis], runs, -1, *value.shape[axis + 1 :])


class Joined(Packed):
    """Pieces (any shapes that differ along `axis` alone) laid side by side along it. Where the axis holds `runs` things one after another
    (gate and up in one tensor), each piece has its slice of every one of them. The first pieces alone are a smaller tensor."""

    form = "core.packed.Joined"

    def __init__(self, pieces: Sequence[Packed], axis: int, runs: int = 1) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.axis, self.runs = axis, runs
        shape = list(pieces[0].shape)
        shape[axis] = sum(piece.shape[axis] for piece in pieces)
        self.shape = tuple(shape)

    @classmethod
    def of(cls, value: Tensor, sizes: Sequence[int], axis: int, runs: int = 1) -> Self:
        """The tensor itself in pieces: sizes count the indices of each piece in one run."""
        pieces = torch.split(_apart(value, axis, runs), list(sizes), axis + 1)
        return cls([Dense(piece.flatten(axis, axis + 1).contiguous()) for piece in pieces], axis, runs)

    def _pieces(self) -> list[Packed]:
        return [piece for piece in self.pieces if isinstance(piece, Packed)]

    def dense(self) -> Tensor:
        laid = [_apart(piece.dense().reshape(piece.shape), self.axis, self.runs) for piece in self._pieces()]
        return torch.cat(laid, self.axis + 1).flatten(self.axis, self.axis + 1)

    @property
    def parts(self) -> int:
        return len(self.pieces)

    def first(self, count: int) -> Joined:
        return Joined(self._pieces()[:count], self.axis, self.runs)

    @property
    def as_is(self) -> bool:
        return all(piece.as_is for piece in self._pieces())

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        # pieces may come in another order than the slices of the target, so each begins with what it holds
        soft = [way(piece, piece.dense()) if way is not None else piece.soften(piece.dense()) for piece in self._pieces()]
        found = [one for one in soft if one is not None]
        return SoftJoined(found, self.axis, self.runs) if len(found) == len(soft) else None

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "pieces": [piece.describe() for piece in self._pieces()], "axis": self.axis, "runs": self.runs}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        pieces = [restore(inner, below(tensors, f"pieces.{i}")) for i, inner in enumerate(described["pieces"])]
        return cls(pieces, described["axis"], described["runs"])


class SoftJoined(Soft):
    """A Joined whose pieces are learned; its first pieces alone are a Soft too, of the same parameters."""

    def __init__(self, pieces: Sequence[Soft], axis: int, runs: int) -> None:
        super().__init__()
        self.joined = Joined(pieces, axis, runs)
        self.shape = self.joined.shape

    def _soft(self) -> list[Soft]:
        return [piece for piece in self.joined.pieces if isinstance(piece, Soft)]

    def dense(self) -> Tensor:
        return self.joined.dense()

    @property
    def parts(self) -> int:
        return self.joined.parts

    def first(self, count: int) -> SoftJoined:
        return SoftJoined(self._soft()[:count], self.joined.axis, self.joined.runs)

    def harden(self) -> Joined:
        return Joined([piece.harden() for piece in self._soft()], self.joined.axis, self.joined.runs)


class Feeding(Packed):
    """`inner`, whose products change their inputs first, as `feed` says: nothing else of it is another's. A subclass stores how."""

    def __init__(self, inner: Packed) -> None:
        super().__init__()
        self.inner, self.shape = inner, inner.shape

    inner: Packed

    @property
    @abstractmethod
    def feed(self) -> Callable[[Tensor], Tensor]:
        """What becomes of an input."""

    @abstractmethod
    def over(self, inner: Packed) -> Feeding:
        """The same before another form."""

    def dense(self) -> Tensor:
        return self.inner.dense()

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.inner.rows(index)

    def matmul(self, x: Tensor) -> Tensor:
        return self.inner.matmul(self.feed(x))

    @property
    def parts(self) -> int:
        return self.inner.parts

    def first(self, count: int) -> Feeding:
        return self.over(self.inner.first(count))

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        soft = self.inner.soften(target, way)
        return None if soft is None else SoftFeeding(self.over(soft))


class SoftFeeding(Soft):
    """A Feeding whose inner form is learned: `around` holds that, a Soft."""

    def __init__(self, around: Feeding) -> None:
        super().__init__()
        self.around, self.shape = around, around.shape

    @property
    def inner(self) -> Soft:
        """What is learned."""
        assert isinstance(self.around.inner, Soft)
        return self.around.inner

    @property
    def feed(self) -> Callable[[Tensor], Tensor]:
        return self.around.feed

    def dense(self) -> Tensor:
        return self.around.dense()

    def harden(self) -> Feeding:
        return self.around.over(self.inner.harden())


class Transposed(Packed):
    """The transpose of a held matrix, `inner`: for weights that a model stores as (m, n), and for forms whose groups run down a column."""

    form = "core.packed.Transposed"

    def __init__(self, inner: Packed) -> None:
        super().__init__()
        self.inner = inner
        self.shape = inner.matrix[::-1]

    @property
    def feed(self) -> Callable[[Tensor], Tensor] | None:
        return self.inner.feed

    def dense(self) -> Tensor:
        return self.inner.dense().reshape(self.inner.matrix).T.contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        m, n = self.inner.matrix
        step = max(1, CHUNK // max(n, 1))
        out = x[..., :step] @ self.inner.rows(slice(0, step)).to(x.dtype)
        for i in range(step, m, step):
            out = out + x[..., i : i + step] @ self.inner.rows(slice(i, i + step)).to(x.dtype)
        return out

    @property
    def parts(self) -> int:
        return self.inner.parts

    def first(self, count: int) -> Transposed:
        return Transposed(self.inner.first(count))

    @property
    def as_is(self) -> bool:
        return self.inner.as_is

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        soft = self.inner.soften(target.T.reshape(self.inner.shape), way)
        return None if soft is None else SoftTransposed(soft)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(restore(described["inner"], below(tensors, "inner")))


class SoftTransposed(Soft):
    """A Transposed whose inner form is learned."""

    def __init__(self, inner: Soft) -> None:
        super().__init__()
        self.inner = inner
        self.shape = inner.matrix[::-1]

    @property
    def feed(self) -> Callable[[Tensor], Tensor] | None:
        return self.inner.feed

    def dense(self) -> Tensor:
        return self.inner.dense().reshape(self.inner.matrix).T

    @property
    def parts(self) -> int:
        return self.inner.parts

    def first(self, count: int) -> SoftTransposed:
        inner = self.inner.first(count)
        return SoftTransposed(inner) if isinstance(inner, Soft) else self

    def harden(self) -> Transposed:
        return Transposed(self.inner.harden())


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def stored_class(path: str) -> Any:
    """The class that a stored path names: `core.packed.Sum`, or `quantize.grid.grouped.Grouped` below the methods."""
    import importlib

    path, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"laconic.{path}" if path.startswith("core.") else f"laconic.methods.{path}"), name)


def restore(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """Any stored form again, by the path in `described["form"]`."""
    found: type[Packed] = stored_class(str(described["form"]))
    return found.restore(described, tensors)


class Held(nn.Module):
    """The one thin layer: a linear, convolution or embedding whose weight is a Packed. The product runs on the form, or on a dense copy
    once `thaw()` made one (for long measurements, where memory is not the point).

    A linear whose weight is stored as (m, n) (transformers' Conv1D) is held as Transposed, and multiplies with what that holds; a table
    may scale its rows (Gemma's)."""

    def __init__(self, weight: Packed, like: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.kind = "Embedding" if isinstance(like, nn.Embedding) else type(like).__name__
        self.scale = float(getattr(like, "scalar_embed_scale", 1.0))
        self._copy: Tensor | None = None
        # bits that its inputs are rounded to as they come; None: they are multiplied as they are
        self.inputs: int | None = None
        if bias is not None:
            self.bias: nn.Parameter | None = nn.Parameter(bias, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        for name in (
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            "in_features",
            "out_features",
            "num_embeddings",
            "embedding_dim",
        ):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def thaw(self, dtype: torch.dtype) -> None:
        """Keep a dense copy in `dtype` and compute with it from now on."""
        self._copy = self.weight.dense().to(dtype)

    def round_inputs(self, bits: int) -> bool:
        """As its form's `round_inputs`; False where it has no product with inputs (tables, convolutions), or a dense copy."""
        turned = self._turned()
        multiplies = turned is not None or not (self.kind == "Embedding" or self.convolves)
        done = multiplies and self._copy is None and (turned or self.weight).round_inputs(bits)
        self.inputs = bits if done else None
        return done

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution of torch's (transformers' Conv1D is a product)."""
        return self.kind in ("Conv1d", "Conv2d", "Conv3d")

    def _turned(self) -> Packed | None:
        """Of a layer that stores its weight as (m, n), the form of its (n, m)."""
        return self.weight.inner if self.kind == "Conv1D" and isinstance(self.weight, Transposed) else None

    def extra_repr(self) -> str:
        return "" if self.inputs is None else f"inputs rounded to {self.inputs} bits"

    def freeze(self) -> None:
        """Drop the dense copy."""
        self._copy = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype) if x.is_floating_point() else self.bias
        if self.kind == "Embedding":
            if self._copy is not None:
                return self._scaled(F.embedding(x, self._copy))
            flat = self.weight.rows(x.reshape(-1))
            return self._scaled(flat.reshape(*x.shape, -1).to(self.dtype))
        if (self._copy is not None or self.convolves) and (feed := self.weight.feed) is not None:
            x = feed(x)
        if (turned := self._turned()) is not None:
            y = x @ self._copy if self._copy is not None else turned.matmul(x)
            return y if bias is None else y + bias
        if self.convolves:
            if (found := self._pointwise(x)) is not None:
                return found if bias is None else found + bias.reshape(-1, *[1] * (x.dim() - 2))
            dense = self._copy if self._copy is not None else self.weight.dense().to(x.dtype)
            conv: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[dense.dim()]
            out: Tensor = conv(x, dense, bias, self.stride, self.padding, self.dilation, self.groups)
            return out
        if self._copy is not None:
            return F.linear(x, self._copy, bias)
        y = self.weight.matmul(x)
        return y if bias is None else y + bias

    def _pointwise(self, x: Tensor) -> Tensor | None:
        """The product of a convolution of 1 x 1 by the form's own kernel, where it has one."""
        conv: Any = self
        plain = set(self.weight.shape[2:]) == {1} and conv.groups == 1 and not any(conv.padding) and x.dim() == len(self.weight.shape)
        if self._copy is not None or not plain:
            return None
        steps: Any = (..., *(slice(None, None, step) for step in conv.stride))
        return self.weight.pixels(x[steps])

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What lookups give, and what a model that asks for its weight's dtype is told."""
        return self.weight.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.weight.dtype = dtype
