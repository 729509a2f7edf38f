"""FlashSVD: layers of low-rank products run tile by tile, so that nothing wide is stored between their factors.

Shao et al. 2025, arXiv:2508.01506.  Of y = (x right^T) left only p = x right^T (t, r) is kept.  Attention: a tile of queries is made of
p_q, turned by its positions, and tiles of keys and values of p_k and p_v pass by under a running maximum m and sum l (FlashAttention):
m' = max(m, max s), l = l e^(m - m') + sum e^(s - m'), o = o e^(m - m') + e^(s - m') v; at last o / l goes through the output's factors.
Feed-forward: for some tokens and neurons at a time h = act(p_gate left_gate) * (p_up left_up) is multiplied with those columns of down's
right factor and added up.  stages=2 keeps these sums, (t, r), and multiplies all of them with the left factor at once; stages=1 does so
within the tile.  Neither q, k, v nor the (t, d_ff) neurons are ever whole; results are those of the products to rounding.
Any method may make the products. It moves nothing, so it is an Align that places parts; each tries itself on a few tokens first, and runs
as the model does where that gives something else, where a matrix is no product, and, of attention, where a cache asks for keys and values.
Sibling: factorize.lowrank.svd (what makes the products)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Held, Packed, Product
from laconic.core.part import Part
from laconic.core.site import Edge, Site
from laconic.core.statistic import Statistic
from laconic.core.transform import Align, Change, Stats
from laconic.kernels.lowrank import Factors, Heads, streamed_attention, streamed_feed

CARD = Card(Paper("Shao et al.", 2025, "arXiv:2508.01506"), catalogue="flashsvd", sibling="factorize.lowrank.svd")

# tokens of a trial, and how far from the model's own results they may be, as a share of their norm
TRIAL, NEAR = 16, {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(frozen=True)
class FlashSVD(Align):
    """tokens: rows of a tile (of queries and of keys too); neurons: hidden neurons of one; stages: of the feed-forward layer."""

    tokens: int = 256
    neurons: int = 512
    stages: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.neurons < 1 or self.stages not in (1, 2):
            raise ValueError(f"tokens={self.tokens}, neurons={self.neurons}, stages={self.stages}: tiles hold something, stages are 1 or 2")

    def opens(self, edge: Edge) -> Mapping[str, Part]:
        if len(edge.writers) != 1 or len(edge.readers) != 1:
            return {}
        writer, reader = edge.writers[0].site, edge.readers[0].site
        ends, (path, _, _) = (writer.roles.get("part"), reader.roles.get("part")), reader.name.rpartition(".")
        # a module of their own holds them, which is no layer with norms, and no table of experts
        alone = path == writer.name.rpartition(".")[0] and path != edge.name.rpartition(".")[0]
        if not alone or writer.transposed or reader.transposed or "expert" in reader.context:
            return {}
        if ends == ("up", "down"):
            return {path: StreamedFeed(self.tokens, self.neurons, self.stages)}
        return {path: StreamedAttention(self.tokens)} if ends == ("v", "o") else {}

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        return ()

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        return Change()


def _numbers(form: Packed) -> Tensor:
    return form.value if isinstance(form, Dense) else form.dense().reshape(form.matrix)


def factors(module: nn.Module) -> Factors | None:
    """Of a layer that is held as a product and multiplies with it as it is."""
    if not isinstance(module, Held) or not isinstance(module.weight, Product) or module.inputs is not None or module._copy is not None:
        return None
    return Factors(_numbers(module.weight.left), _numbers(module.weight.right), module.bias)


class Streamed(Part):
    """Around a module, whose own children and parameters it has: `plain` is that module on what the part holds now."""

    sound: bool | None

    def over(self, module: nn.Module) -> None:
        # one table of children and parameters for both: what is filled, held or moved here is so there
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = module.__dict__[table]
        # not a submodule: it would have every tensor twice
        self.inner, self.sound = (module,), None

    def plain(self, *args: Any, **words: Any) -> Any:
        return self.inner[0](*args, **words)

    def _named(self, *begins: str) -> list[Factors] | None:
        """Factors of the children whose names begin so, one each; None where any is not there."""
        found = []
        for begin in begins:
            named = [child for name, child in self.named_children() if name.startswith(begin) and isinstance(child, Held)]
            one = factors(named[0]) if len(named) == 1 else None
            if one is None:
                return None
            found.append(one)
        return found

    def _sound(self, wanted: Callable[[], Any], made: Callable[[], Tensor]) -> bool:
        """Whether both agree on a trial, asked once."""
        if self.sound is None:
            try:
                with torch.no_grad():
                    first = wanted()
                    right, ours = (first[0] if isinstance(first, tuple) else first), made()
                near = NEAR.get(right.dtype, 0.03) * float(right.double().norm())
                self.sound = ours.shape == right.shape and float((ours.double() - right.double()).norm()) <= max(near, 1e-30)
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
                self.sound = False
            if not self.sound:
                warnings.warn(
                    f"{type(self.inner[0]).__name__} is not streamed: it computes something else, and runs as it is", stacklevel=3
                )
        return self.sound


class StreamedFeed(Streamed):
    """A feed-forward layer x -> (b, t, n), gated or not."""

    part: ClassVar[str] = "factorize.stream.flashsvd.StreamedFeed"

    def __init__(self, tokens: int, neurons: int, stages: int) -> None:
        super().__init__()
        self.tokens, self.neurons, self.stages = tokens, neurons, stages

    def _layers(self) -> tuple[list[Factors], Factors, nn.Module] | None:
        held = [child for child in self.children() if isinstance(child, Held)]
        rest = [child for child in self.children() if not isinstance(child, (Held, nn.Dropout))]
        found = [factors(child) for child in held]
        if len(rest) != 1 or len(found) not in (2, 3) or None in found:
            return None
        # in the order in which they stand: what goes in (the gate first), then what goes out
        *ups, down = (one for one in found if one is not None)
        return ups, down, rest[0]

    def streamed(self, x: Tensor) -> Tensor | None:
        found = self._layers()
        if found is None:
            return None
        ups, down, act = found
        return streamed_feed(x, ups, down, act, tokens=self.tokens, neurons=self.neurons, stages=self.stages)

    def forward(self, *args: Any, **words: Any) -> Any:
        if len(args) != 1 or words or self._layers() is None or (torch.is_grad_enabled() and args[0].requires_grad):
            return self.plain(*args, **words)
        few = args[0][..., :TRIAL, :]
        if not self._sound(lambda: self.plain(few), lambda: self.streamed(few)):  # type: ignore[arg-type, return-value]
            return self.plain(*args)
        return self.streamed(args[0])

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "tokens": self.tokens, "neurons": self.neurons, "stages": self.stages}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["tokens"], described["neurons"], described["stages"])


class StreamedAttention(Streamed):
    """Attention as transformers' decoders have it: hidden states, cos and sin, a mask."""

    part: ClassVar[str] = "factorize.stream.flashsvd.StreamedAttention"

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def streamed(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """x (b, t, m) -> (b, t, n). AttributeError, ValueError or RuntimeError where the module is of another kind."""
        inner: Any = self.inner[0]
        found = self._named("q", "k", "v", "o")
        if found is None:
            raise ValueError("not all of its matrices are products")
        q, k, v, out = found
        d = int(inner.head_dim)
        heads = Heads(q.left.shape[1] // d, k.left.shape[1] // d, float(inner.scaling), turn, mask, bool(inner.is_causal))
        return streamed_attention(x, q, k, v, out, heads, queries=self.tokens, keys=self.tokens)

    def forward(self, hidden_states: Tensor, *args: Any, **words: Any) -> Any:
        x = hidden_states
        # architectures call their cache by several names
        cached = any(hasattr(value, "get_seq_length") for value in (*args, *words.values()))
        turn, mask = words.get("position_embeddings"), words.get("attention_mask")
        simple = not args and not words.get("output_attentions") and (mask is None or mask.dim() == 4)
        if cached or not simple or self._named("q", "k", "v", "o") is None or (torch.is_grad_enabled() and x.requires_grad):
            return self.plain(x, *args, **words)
        few, begin = x[:, :TRIAL], None if turn is None else (turn[0][:, :TRIAL], turn[1][:, :TRIAL])
        looks = None if mask is None else mask[..., :TRIAL, :TRIAL]
        less = {**words, "attention_mask": looks, **({} if turn is None else {"position_embeddings": begin})}
        if not self._sound(lambda: self.plain(few, **less), lambda: self.streamed(few, begin, looks)):
            return self.plain(x, **words)
        return self.streamed(x, turn, mask), None

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "tokens": self.tokens}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["tokens"])
