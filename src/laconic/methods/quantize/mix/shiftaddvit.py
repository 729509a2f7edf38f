"""ShiftAddViT: a trained vision transformer whose products become additions and shifts, and multiplications only for tokens that need them.

You et al. 2023, arXiv:2306.06446, section 4.  Attention: q, k of unit norm become codes of 0 and 1 (above the mean or not: the
image's, so that no image depends on those beside it), and o = x / |x| + dconv(v), x = v / 2 + q (k^T v) / pi, so both products are sums of
entries; dconv: over 9 tokens, channel by channel. The four projections: w -> sign(w) 2^round(log2 |w|), a shift (Elhoushi et al. 2019,
arXiv:1905.13298, section 3), learned straight through. MLP (eq. 4): y = p_i e_i(h), i = argmax p, p = softmax(R h), e_0 the layer as it
was, e_1 its copy in shifts. Balance (eq. 5): for each layer weight * (SCV(a_i sum_t p_i) + SCV(a_i sum_t P(i is taken under noise))),
SCV(x) = var(x) / mean(x)^2, a_i its share of the latency: tokens go to experts in inverse proportion to it. KL to the original in place
of the loss of the classes. In two stages: attention until `until` of the steps, then also shifts and experts.
Codes of sign and power: `bits`, one power of two a row.  Sibling: route.gate.factorllm (experts that all multiply)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Held, Packed
from laconic.core.part import adopt
from laconic.core.router import Router, Settling
from laconic.core.site import Anatomy, Linear, Site
from laconic.core.transform import Change, Lesson
from laconic.kernels.grids import through
from laconic.kernels.levels import Levels
from laconic.kernels.losses import Divergence
from laconic.methods.quantize.grid.levels import Leveled

CARD = Card(Paper("You et al.", 2023, "arXiv:2306.06446", "section 4"), catalogue="shiftaddvit", sibling="route.gate.factorllm")

# tokens that the depthwise convolution of values sees
NEAR = 9
# what transformers knows the attention by
NAMED = "laconic-shiftadd"
# deviation of the noise under which an expert may be taken, over the number of experts (Riquelme et al. 2021, arXiv:2106.05974, appendix A)
NOISE = 1.0


# ---- shifts


def shifts(bits: int) -> Levels:
    """Codes of a sign and bits - 1 bits of a power."""
    return Levels(bits, "codebook", None, "e8m0")


def powers(bits: int) -> Tensor:
    """The values of the codes, rising, (2^bits,) bf16: -1, -1/2, .. 1/2, 1."""
    half = torch.pow(2.0, -torch.arange(2 ** (bits - 1)).float())
    return torch.cat([-half, half.flip(0)]).bfloat16()


def shifted(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight (n, m) -> codes (n, m) uint8 and scales (n, 1) fp32, the powers of two of the rows' greatest weights. What is beyond the least
    power becomes that one."""
    least = 2.0**-126
    near = weight.abs().float().clamp(min=least).log2().round()
    top = near.amax(1, keepdim=True)
    down = (top - near).clamp(max=2 ** (bits - 1) - 1).to(torch.uint8)
    return torch.where(weight < 0, down, 2**bits - 1 - down), torch.exp2(top)


def as_shifts(weight: Tensor, bits: int) -> Leveled:
    """The nearest shifts in the logarithm, held."""
    codes, scale = shifted(weight.detach(), bits)
    return Leveled.of(tuple(weight.shape), shifts(bits), codes, scale, None, powers(bits))


class Shifted(nn.Linear):
    """A linear whose weight is learned in powers of two; plain: as it is."""

    bits: int
    plain: bool

    @classmethod
    def of(cls, layer: nn.Linear, bits: int) -> Shifted:
        """One that has the parameters of `layer`."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias, made.bits, made.plain = layer.weight, layer.bias, bits, False
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return super().forward(x)
        codes, scale = shifted(self.weight.detach(), self.bits)
        rounded = powers(self.bits).to(x.device, torch.float32)[codes.long()] * scale
        return F.linear(x, through(self.weight, rounded.to(self.weight.dtype)), self.bias)


def empty(n: int, m: int, bits: int, bias: bool) -> Held:
    """A linear (n, m) of shifts whose codes are yet to be read. Its table is not stored, as it follows from the bits."""
    levels = shifts(bits)
    codes, scales = (torch.empty(n, width, dtype=torch.uint8, device="meta") for width in (-(-m * bits // 8), 1))
    like = nn.Linear(m, n, bias=bias, device="meta")
    return Held(_known(Leveled((n, m), levels, codes, scales, None, None), bits), like, like.bias)


def _known(form: Leveled, bits: int) -> Leveled:
    del form.table
    form.register_buffer("table", powers(bits), persistent=False)
    return form


# ---- attention of additions


def coded(x: Tensor) -> Tensor:
    """x (b, h, t, d) -> 1 where it is above the mean of its image, else 0, with the gradient of x between 0 and 1."""
    return through(x.clamp(0, 1), (x > x.mean((1, 2, 3), keepdim=True)).to(x.dtype))


def added(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """q, k, v (b, h, t, d), near (h d, 9) -> (b, h, t, d)."""
    q, k = (coded(F.normalize(side, dim=-1)) for side in (q, k))
    x = v / 2 + q @ (k.transpose(-1, -2) @ v) / math.pi
    lines = v.transpose(-1, -2).flatten(1, 2)
    local = F.conv1d(lines, near[:, None].to(v.dtype), padding=near.shape[1] // 2, groups=lines.shape[1])
    return F.normalize(x, dim=-1) + local.unflatten(1, (v.shape[1], v.shape[3])).transpose(-1, -2)


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """As transformers calls an implementation of attention."""
    if mask is not None:
        raise ValueError("attention of additions sees all tokens; it takes no mask")
    part: Attention
    (part,) = module.laconic_part  # type: ignore[misc]
    part.called = True
    return part.attend(q, k, v).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAMED, _attend)  # type: ignore[no-untyped-call]


class _Part(Settling):
    """What both parts have in common: layers of linears, some of which end in shifts. names: of linears below, with their shapes."""

    def __init__(self, names: Mapping[str, Sequence[int]], bits: int, until: float, settled: bool) -> None:
        super().__init__()
        self.names = {name: (int(n), int(m)) for name, (n, m) in names.items()}
        self.bits, self.until, self.held = bits, until, settled
        self._layer: tuple[nn.Module, ...] = ()
        self._done = 0.0

    def around(self, path: str, model: nn.Module) -> None:
        layer = model.get_submodule(path)
        self._layer = (layer,)
        adopt(self, layer)
        # what takes the place of one of its modules later on is the layer's too
        layer._modules = self._modules

    @property
    def early(self) -> bool:
        """Whether the first stage is not over."""
        return self.run == "learning" and self._done < self.until

    def describe(self) -> dict[str, Any]:
        named = {name: list(shape) for name, shape in self.names.items()}
        return {"part": self.part, "names": named, "bits": self.bits, "until": self.until, "settled": self.held}


class Attention(_Part):
    """Attention of additions over projections of shifts. names: q, k, v and what writes, in this order."""

    part = "quantize.mix.shiftaddvit.Attention"

    def __init__(self, names: Mapping[str, Sequence[int]], bits: int, until: float, settled: bool = False) -> None:
        super().__init__(names, bits, until, settled)
        self.near = nn.Parameter(torch.empty(self._shapes[2][0], NEAR, device="meta"), requires_grad=False)
        self.called = False

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        return list(self.names.values())

    def around(self, path: str, model: nn.Module) -> None:
        super().around(path, model)
        layer: Any = self._layer[0]
        layer.config = copy.copy(layer.config)
        # in a tuple, as the part has the layer's modules for its own
        layer.laconic_part = (self,)
        self._usual = layer.config._attn_implementation
        for name in () if self.held else self.names:
            self._modules[name] = Shifted.of(self.get_submodule(name), self.bits)  # type: ignore[arg-type]

    def fits(self, path: str, model: nn.Module) -> bool:
        layer: Any = copy.copy(model.get_submodule(path))
        config = getattr(layer, "config", None)
        if getattr(config, "_attn_implementation", None) is None or getattr(layer, "is_causal", False):
            return False
        layer.config, layer.laconic_part, self.called = copy.copy(config), (self,), False
        layer.config._attn_implementation = NAMED
        weight: Tensor = layer.get_submodule(next(iter(self.names))).weight
        near, self.near = self.near, nn.Parameter(weight.new_zeros(self.near.shape), requires_grad=False)
        try:
            found = layer(weight.new_zeros(1, 2, weight.shape[1]))
        except (RuntimeError, TypeError, ValueError):
            return False
        finally:
            self.near = near
        return self.called and first_of(found).shape == (1, 2, self._shapes[3][0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (b, h, t, d) -> (b, h, t, d)."""
        return added(q, k, v, self.near)

    def begin(self, generator: torch.Generator) -> None:
        # values reach only their own token until something else is learned
        self.near = nn.Parameter(torch.zeros(self.near.shape))

    def penalty(self, done: float) -> None:
        self._done = done

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self._layer[0]
        usual = self.asks == "all"
        layer.config._attn_implementation = self._usual if usual else NAMED
        for name in self.names:
            if isinstance(child := self._modules[name], Shifted):
                child.plain = usual or self.early
        found = layer(*args, **kwargs)
        tokens = first_of(found).shape[:-1].numel()
        dense = tokens * sum(n * m for n, m in self._shapes)
        multiplied = tokens * self.near.numel()
        self.count(tokens, dense, dense if usual else multiplied, dense if usual else multiplied)
        return found

    def settle(self) -> dict[str, Packed]:
        found: dict[str, Packed] = {}
        for name in self.names:
            child: Any = self._modules[name]
            found[f"{name}.weight"] = form = as_shifts(child.weight, self.bits)
            self._modules[name] = Held(form, child, child.bias)
        self.held = True
        return found

    def settled(self) -> dict[str, int]:
        sizes = {f"{name}.weight": Leveled.bytes_of(*shape, shifts(self.bits)) for name, shape in self.names.items()}
        return {**sizes, "": 2 * self.near.numel()}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(*(described[key] for key in ("names", "bits", "until", "settled")))


def first_of(found: Any) -> Tensor:
    """Of what a layer gives, the hidden states."""
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


# ---- an MLP of two primitives


def unevenness(x: Tensor) -> Tensor:
    """SCV: the variance over the squared mean, of x (N,) >= 0."""
    return x.var(correction=0) / x.mean().square().clamp(min=1e-10)


def balance(logits: Tensor, latencies: Tensor) -> Tensor:
    """Eq. 5 for logits (t, 2) of two experts and their shares of the latency (2,): the unevenness of importance and of load."""
    p = logits.softmax(-1)
    apart = (p[:, 0] - p[:, 1]) * (p.shape[1] / NOISE) / math.sqrt(2)
    taken = torch.stack([torch.special.ndtr(apart), torch.special.ndtr(-apart)], -1)
    return unevenness(latencies * p.sum(0)) + unevenness(latencies * taken.sum(0))


class Mixture(_Part):
    """The MLP and its copy in shifts, of which one runs for each token. names: its two linears."""

    part = "quantize.mix.shiftaddvit.Mixture"

    def __init__(
        self,
        names: Mapping[str, Sequence[int]],
        bits: int,
        until: float,
        latency: float,
        weight: float,
        scaled: bool,
        biases: Sequence[bool] = (),
        settled: bool = False,
    ) -> None:
        super().__init__(names, bits, until, settled)
        self.latency, self.weight, self.scaled, self.biases = latency, weight, scaled, tuple(biases)
        (_, width), *_ = self.names.values()
        self.router = nn.Parameter(torch.empty(2, width, device="meta"), requires_grad=False)
        # until it is known which linears have a bias there is none of them
        self.fast = self._empty() if self.biases else nn.ModuleDict()

    def _empty(self) -> nn.ModuleDict:
        made: dict[str, nn.Module] = {}
        for (name, (n, m)), bias in zip(self.names.items(), self.biases, strict=True):
            blank = nn.Linear(m, n, bias=bias, device="meta")
            made[name] = empty(n, m, self.bits, bias) if self.held else Shifted.of(blank, self.bits)
        return nn.ModuleDict(made).requires_grad_(False)

    def fits(self, path: str, model: nn.Module) -> bool:
        layer = model.get_submodule(path)
        (_, width), (out, _) = self.names.values()
        linears: list[Any] = [layer.get_submodule(name) for name in self.names]
        self.biases = tuple(linear.bias is not None for linear in linears)
        self.fast = self._empty()
        try:
            found: Tensor = layer(linears[0].weight.new_zeros(1, width))
            return found.shape == (1, out)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False

    def begin(self, generator: torch.Generator) -> None:
        self.router = nn.Parameter(torch.randn(self.router.shape, generator=generator) * self.router.shape[1] ** -0.5)
        # it begins as the layer does
        copies = {name: copy.deepcopy(self.get_submodule(name)) for name in self.names}
        self.fast = nn.ModuleDict({name: Shifted.of(linear, self.bits) for name, linear in copies.items()})  # type: ignore[arg-type]

    def penalty(self, done: float) -> Tensor | None:
        self._done = done
        return None if self.error is None or self.weight == 0 else self.weight * self.error

    @property
    def _latencies(self) -> Tensor:
        return torch.tensor([self.latency, 1 - self.latency])

    def _quick(self, x: Tensor) -> Tensor:
        """The expert of shifts."""
        layer = copy.copy(self._layer[0])
        layer._modules = {**layer._modules, **self.fast._modules}
        out: Tensor = layer(x)
        return out

    def chosen(self, logits: Tensor) -> Tensor:
        """logits (t, 2) -> which tokens the layer as it was computes, (t,) bool."""
        return logits[:, 0] >= logits[:, 1]

    def label(self, logits: Tensor) -> Tensor:
        """As many tokens for the layer as it was as the balance asks for, those that the router likes it most for, (t,) bool."""
        many = round(len(logits) * (1 - self.latency))
        return torch.zeros(len(logits), dtype=torch.bool).index_fill_(0, (logits[:, 0] - logits[:, 1]).topk(many).indices, True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        dense = len(x) * sum(n * m for n, m in self.names.values())
        if self.asks == "all" or self.early:
            self.error = None
            self.count(len(x), dense, dense, dense)
            y: Tensor = self._layer[0](x)
            return y.reshape(hidden_states.shape)
        logits = F.linear(x, self.router)
        slow = self.label(logits) if self.asks == "labels" else self.chosen(logits)
        own = len(x) * self.router.numel()
        self.count(len(x), dense, dense * float(slow.float().mean()) + own, dense + own)
        if self.run == "learning":
            self.error = balance(logits, self._latencies.to(logits.device))
        p = logits.softmax(-1)
        gate = torch.where(slow, p[:, 0], p[:, 1])
        gate = gate if self.scaled else through(gate, torch.ones_like(gate))
        if self.run == "gathered":
            y = torch.empty_like(x)
            for rows, expert in ((slow.nonzero()[:, 0], self._layer[0]), ((~slow).nonzero()[:, 0], self._quick)):
                if rows.numel():
                    y[rows] = expert(x[rows]).to(y.dtype)
        else:
            y = torch.where(slow[:, None], self._layer[0](x), self._quick(x))
        return (y * gate[:, None]).reshape(hidden_states.shape)

    def settle(self) -> dict[str, Packed]:
        found: dict[str, nn.Module] = {}
        for name in self.names:
            layer: Any = self.fast[name]
            found[name] = Held(_known(as_shifts(layer.weight, self.bits), self.bits), layer, layer.bias)
        self.fast = nn.ModuleDict(found)
        self.held = True
        return {}

    def settled(self) -> dict[str, int]:
        # codes and powers; biases and the router in bf16
        levels = shifts(self.bits)
        forms = sum(Leveled.bytes_of(*shape, levels) - 2 * 2**levels.bits for shape in self.names.values())
        biases = sum(n for (n, _), bias in zip(self.names.values(), self.biases, strict=True) if bias)
        return {"": forms + 2 * (biases + self.router.numel())}

    def describe(self) -> dict[str, Any]:
        more = {"latency": self.latency, "weight": self.weight, "scaled": self.scaled, "biases": list(self.biases)}
        return super().describe() | more

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        keys = ("names", "bits", "until", "latency", "weight", "scaled", "biases", "settled")
        return cls(*(described[key] for key in keys))


# ---- the method


@dataclass(frozen=True)
class ShiftAddViT(Router):
    """bits: of a shift, sign included; until: the share of the steps in which only attention changes; latency: the multiplying expert's
    share of the time that both take for a token; weight: of the balance; scaled: an expert's answer counts by its probability (eq. 4), not
    in full; rate: of weights; router_rate: of routers and of the convolution, Adam, falling along a cosine; batch: images a step."""

    acts_on = (Linear,)
    learns: ClassVar[Literal["parts", "model"]] = "model"
    bits: int = 5
    until: float = 0.5
    latency: float = 0.6
    weight: float = 0.01
    scaled: bool = True
    rate: float = 3e-3
    router_rate: float = 1e-2
    steps: int = 1000
    batch: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a sign and 1 to 7 bits of a power")
        if not 0 <= self.until < 1 or not 0 < self.latency < 1:
            raise ValueError(f"until={self.until} and latency={self.latency}: shares, below 1")
        if self.steps < 1 or self.batch < 1 or self.weight < 0:
            raise ValueError(f"steps={self.steps}, batch={self.batch} must be at least 1, weight={self.weight} at least 0")

    @property
    def lesson(self) -> Lesson:
        rates = (("weight", self.rate), ("bias", self.rate), ("near", self.router_rate), ("router", self.router_rate))
        return Lesson(Divergence(), rates=rates, steps=self.steps, batch=self.batch, decay="cosine")

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        owner, _, leaf = site.name.rpartition(".")
        inside = {s.name.removeprefix(f"{owner}."): s for s in anatomy.sites(Linear) if s.name.startswith(f"{owner}.")}
        if leaf != next(iter(inside), "") or any(s.transposed or "." in name for name, s in inside.items()):
            return Change()
        shapes = {name: s.shape for name, s in inside.items()}
        if (named := projections(shapes)) is not None:
            return Change(place={owner: Attention({name: shapes[name] for name in named}, self.bits, self.until)})
        if len(shapes) == 2 and len({*shapes.values(), *(shape[::-1] for shape in shapes.values())}) == 2:
            return Change(place={owner: Mixture(shapes, self.bits, self.until, self.latency, self.weight, self.scaled)})
        return Change()


def projections(shapes: Mapping[str, Sequence[int]]) -> tuple[str, str, str, str] | None:
    """Of linears below a module, the names of those that make q, k and v, and of the one that writes; None where they are not so."""
    if len(shapes) != 4:
        return None
    found = {name[0]: name for name in shapes if name[0] in "qkv"}
    (last,) = [name for name in shapes if name not in found.values()] if len(found) == 3 else ("",)
    return (found["q"], found["k"], found["v"], last) if last else None
