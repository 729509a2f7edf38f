"""What a model is made of: one row of data for each decoder architecture, and tracing for every other module.

`decoder_anatomy` reads a row of DECODERS; `traced_anatomy` runs the module once. Neither looks at weights' values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.errors import UserError
from laconic.core.site import Anatomy, Conv, Edge, Embedding, Group, IndexMap, Kind, Linear, Member, Segment, Site, Stage, TensorId


@dataclass(frozen=True)
class Decoder:
    """Where the parts of one architecture lie. Paths below `blocks` are relative to a layer; the others are whole module paths.

    Biases need no entry: they are found among the stored tensors. `head_norms` are norms over each head of q and k."""

    blocks: str = "model.layers"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    head_norms: Mapping[str, str] = field(default_factory=dict)
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


# keyed by `model_type` of config.json
DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(head_norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"}),
}

# sites of one stage see the same input
STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")


@dataclass(frozen=True)
class DecoderAnatomy(Anatomy):
    """A stack of equal layers between an embedding and a head. `stored` maps a parameter's name in the module to the stored tensor."""

    row: Decoder
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    _segments: tuple[Segment, ...] = ()
    _sites: Mapping[str, Site] = field(default_factory=dict)

    @property
    def tail(self) -> tuple[Site, ...]:
        """The embedding, and the head where it is not tied."""
        return self._segments[-1].sites

    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that are no site's weight: norms, biases, and what the architecture does not use."""
        covered = {site.tensors["weight"].name for site in self._sites.values()}
        return tuple(name for name in self.shapes if name not in covered)

    def coupled(self, site: Site, axis: int) -> Group:
        """MLP channels, KV heads with the query heads they serve, the residual stream's width, or the vocabulary."""
        part = site.roles["part"]
        if (part, axis) in (("gate", 0), ("up", 0), ("down", 1)):
            gate, up, down = (self._part(site, name) for name in ("gate", "up", "down"))
            return Group(gate.shape[0], (Member(gate, 0, IndexMap()), Member(up, 0, IndexMap()), Member(down, 1, IndexMap())))
        if (part, axis) in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            q, k, v, o = (self._part(site, name) for name in ("q", "k", "v", "o"))
            own = IndexMap(block=self.head_dim)
            served = IndexMap(block=self.head_dim * (self.heads // self.kv_heads))
            return Group(self.kv_heads, (Member(q, 0, served), Member(k, 0, own), Member(v, 0, own), Member(o, 1, served)))
        tail = [s for s in self._sites.values() if s.roles["part"] in ("embed", "head")]
        if part in ("embed", "head") and axis == 0:
            return Group(site.shape[0], tuple(Member(s, 0, IndexMap()) for s in tail))
        members = [Member(s, 1, IndexMap()) for s in tail]
        members += [Member(s, 1, IndexMap()) for s in self._sites.values() if s.roles["part"] in READERS]
        members += [Member(s, 0, IndexMap()) for s in self._sites.values() if s.roles["part"] in WRITERS]
        return Group(tail[0].shape[1], tuple(members))

    def edges(self) -> Iterator[Edge]:
        """The residual stream; in each layer up -> down (exact scales) and v -> o (`width` is v's: an entry of v feeds the same entry
        of each query head it serves)."""
        every = list(self._sites.values())
        tail = [s for s in every if s.roles["part"] in ("embed", "head")]
        embed, head = tail[0], tail[-1]
        norms = dict.fromkeys(TensorId(s.context["norm"]) for s in every if "norm" in s.context)
        yield Edge(
            "residual",
            embed.shape[1],
            (embed, *(s for s in every if s.roles["part"] in WRITERS)),
            (*(s for s in every if s.roles["part"] in READERS), head),
            tuple(norms),
        )
        for i in range(self.layers):
            prefix = f"{self.row.blocks}.{i}"
            up, down, v, o = (self._sites[f"{prefix}.{getattr(self.row, part)}"] for part in ("up", "down", "v", "o"))
            yield Edge(f"{prefix}.gate", up.shape[0], (up,), (down,))
            yield Edge(f"{prefix}.value", v.shape[0], (v,), (o,))

    def _part(self, site: Site, part: str) -> Site:
        return self._sites[f"{self.row.blocks}.{site.context['layer']}.{getattr(self.row, part)}"]


def decoder_anatomy(row: Decoder, config: Any, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]) -> DecoderAnatomy:
    """config: of transformers; shapes: of all stored tensors; stored: parameter name in the module -> stored name."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}

    def site(name: str, kind: Linear | Embedding, roles: dict[str, str], context: dict[str, Any]) -> Site:
        tensors = {role: TensorId(stored[f"{name}.{role}"]) for role in ("weight", "bias") if f"{name}.{role}" in stored}
        return Site(name, kind, tensors, tuple(shapes[tensors["weight"].name]), roles, context)

    segments = []
    sites: dict[str, Site] = {}
    # where a stored tensor lies in the module; an unused one lies where its own name says
    home = {found: parameter for parameter, found in stored.items()}
    taken: set[str] = set()
    for i in range(layers):
        prefix = f"{row.blocks}.{i}"
        stages = []
        for stage in STAGES:
            members = []
            for part in stage:
                roles = {"part": part}
                context: dict[str, Any] = {"layer": i}
                if part in ("q", "k", "v", "o"):
                    context |= attention
                if part in READERS:
                    roles["stream"] = "reads"
                    context["norm"] = stored[f"{prefix}.{row.mlp_norm if part in ('gate', 'up') else row.attention_norm}.weight"]
                if part in WRITERS:
                    roles["stream"] = "writes"
                if part in row.head_norms:
                    context["head_norm"] = stored[f"{prefix}.{row.head_norms[part]}.weight"]
                members.append(site(f"{prefix}.{getattr(row, part)}", Linear(), roles, context))
            stages.append(Stage(tuple(members)))
        tensors = tuple(name for name in shapes if home.get(name, name).startswith(f"{prefix}."))
        taken.update(tensors)
        segments.append(Segment(prefix, tuple(stages), tensors))
        sites |= {s.name: s for s in segments[-1].sites}
    tied = stored[f"{row.embed}.weight"] == stored[f"{row.head}.weight"]
    last = stored[f"{row.norm}.weight"]
    if tied:
        tail = [site(row.embed, Embedding(), {"part": "embed", "stream": "both", "tied": row.head}, {"norm": last})]
    else:
        tail = [
            site(row.embed, Embedding(), {"part": "embed", "stream": "writes"}, {}),
            site(row.head, Linear(), {"part": "head", "stream": "reads"}, {"norm": last}),
        ]
    segments.append(Segment("", tuple(Stage((s,)) for s in tail), tuple(name for name in shapes if name not in taken)))
    sites |= {s.name: s for s in tail}
    return DecoderAnatomy(row, layers, heads, kv_heads, head_dim, shapes, stored, tuple(segments), sites)


# ---- any other module, by running it

SITES: Mapping[type[nn.Module], Kind] = {nn.Linear: Linear(), nn.Conv1d: Conv(), nn.Conv2d: Conv(), nn.Embedding: Embedding()}
# modules whose stored tensors have one entry for each channel, and the axis of the channels in their input
CHANNELWISE: Mapping[type[nn.Module], int] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.BatchNorm3d: 1,
    nn.GroupNorm: 1,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 1,
    nn.PReLU: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
}
# how many channels are marked in one run, one for each item of a batch
LANES = 16


@dataclass(frozen=True)
class Channelwise:
    """A norm that falls together with a group: entry `index(i)` of each of its stored tensors goes with canonical index i."""

    name: str
    tensors: tuple[TensorId, ...]
    index: IndexMap


def slices(member: Member | Channelwise, i: int, size: int) -> range:
    """Indices of a member, whose axis has `size` of them, that fall with canonical index i: none where the member is narrower."""
    found = member.index(i)
    return range(max(found.start, 0), max(min(found.stop, size), 0))


def stored_names(module: nn.Module) -> dict[str, str]:
    """Every name of the state dict -> the name it is stored under: the first of those that share one tensor."""
    first: dict[tuple[int, ...], str] = {}
    names: dict[str, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            key = (value.data_ptr(), *value.shape, *value.stride()) if value.numel() and not value.is_meta else (-1, id(value))
            names[name] = first.setdefault(key, name)
    return names


@dataclass(frozen=True)
class TracedAnatomy(Anatomy):
    """Sites of one module in order of first execution. `coupled` marks channels and watches where they arrive, through the module's own
    forward, so shortcuts, padding, flattening and concatenation need no rules. `names`: state dict name -> stored name."""

    module: nn.Module
    example: tuple[Any, ...]
    names: Mapping[str, str]
    found: tuple[Site, ...]

    def segments(self) -> tuple[Segment, ...]:
        return (Segment("", tuple(Stage((site,)) for site in self.found), tuple(dict.fromkeys(self.names.values()))),)

    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that are no site's weight: norms, biases, running statistics, and weights of unknown modules."""
        covered = {site.tensors["weight"].name for site in self.found}
        return tuple(name for name in dict.fromkeys(self.names.values()) if name not in covered)

    def edges(self) -> Iterator[Edge]:
        """None: where an exact edit may act depends on operators, which a trace does not know."""
        return iter(())

    def coupled(self, site: Site, axis: int) -> Group:
        """All slices that meet those of `site` along `axis`. Raises UserError where a module with weights of an unknown kind reads them."""
        return self._channels.group(site, axis)[0]

    def norms(self, site: Site, axis: int) -> tuple[Channelwise, ...]:
        """Norms that fall together with `coupled(site, axis)`."""
        return self._channels.group(site, axis)[1]

    @functools.cached_property
    def _channels(self) -> _Channels:
        return _Channels(self)


def traced_anatomy(module: nn.Module, example_input: Any) -> TracedAnatomy:
    """The anatomy of any module, from one run with `example_input`: a batch, or a tuple of arguments that are batches."""
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    example = tuple(a[:1] if isinstance(a, Tensor) and a.dim() else a for a in args)
    names = stored_names(module)
    run = _Run(module)
    with run.real():
        run(example)
    owners: dict[str, list[str]] = {}
    for name in run.order:
        owners.setdefault(names[f"{name}.weight" if name else "weight"], []).append(name)
    # modules that share a tensor but never ran count as tied too
    for name, kept in names.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and kept in owners and path not in owners[kept]:
            owners[kept].append(path)
    fixed = _ends(run, example)
    sites = []
    for kept, (name, *others) in owners.items():
        inner = module.get_submodule(name)
        tensors = {"weight": TensorId(kept)}
        weight: Any = inner.weight
        if getattr(inner, "bias", None) is not None:
            tensors["bias"] = TensorId(names[f"{name}.bias" if name else "bias"])
        context: dict[str, Any] = {"fixed": fixed[name], "norms": tuple(run.follows.get(name, ()))}
        if isinstance(inner, nn.Conv1d | nn.Conv2d):
            context |= {key: getattr(inner, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        if others:
            context["tied"] = tuple(others)
        roles = {"tied": others[0]} if others else {}
        sites.append(Site(name, SITES[type(inner)], tensors, tuple(weight.shape), roles, context))
    return TracedAnatomy(module, example, names, tuple(sites))


def _is_site(module: nn.Module) -> bool:
    if type(module) not in SITES or "weight" not in module._parameters:
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros" and getattr(module, "max_norm", None) is None


def _is_norm(module: nn.Module) -> bool:
    stored = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return type(module) in CHANNELWISE and bool(stored) and all(t.dim() <= 1 for t in stored)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


class _Run:
    """Runs a module in eval mode without gradients and watches its parts. In a cut run every site gives back its recorded output, so
    what is marked at one site's output arrives at the next sites unmixed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = dict(module.named_modules())
        self.sites = {name: inner for name, inner in self.names.items() if _is_site(inner)}
        self.order: list[str] = []
        self.follows: dict[str, list[str]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        # names of sites whose output is marked, and how: output of one call -> marked output
        self.mark: dict[str, Callable[[Tensor], Tensor]] = {}
        self.lanes = 1

    def __call__(self, example: tuple[Any, ...]) -> Any:
        """One run of the module."""
        training = {name: inner.training for name, inner in self.names.items()}
        self.module.eval()
        try:
            with torch.no_grad():
                return self.module(*example)
        except UserError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            raise UserError(
                f"the module does not run on its example input ({type(error).__name__}: {text}): give a batch that fits it"
            ) from error
        finally:
            for name, was in training.items():
                self.names[name].training = was

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(inner: nn.Module, args: Any, output: Any = None) -> None:
            self.inputs.setdefault(name, []).extend(a for a in args if isinstance(a, Tensor))

        return hook

    @contextlib.contextmanager
    def real(self) -> Iterator[None]:
        """Notes the order of the sites, their outputs, and the norms that read a site's output as it is."""
        made: dict[int, str] = {}
        kept: list[Tensor] = []
        hooks = []

        def ran(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any, output: Tensor) -> None:
                if name not in self.order:
                    self.order.append(name)
                # the next operator may work in place
                self.outputs.setdefault(name, []).append(self._lane(output.detach()).clone())
                made[id(output)] = name
                kept.append(output)

            return hook

        def read(name: str) -> Callable[..., None]:
            def hook(inner: nn.Module, args: Any) -> None:
                if args and id(args[0]) in made:
                    self.follows.setdefault(made[id(args[0])], []).append(name)

            return hook

        self.outputs.clear()
        for name, inner in self.names.items():
            if name in self.sites:
                hooks.append(inner.register_forward_hook(ran(name)))
            elif type(inner) in CHANNELWISE:
                hooks.append(inner.register_forward_pre_hook(read(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _lane(self, value: Tensor) -> Tensor:
        """The part of the first lane; refused where the lanes of a repeated example are not equal parts of the first axis."""
        if self.lanes == 1:
            return value
        if not value.dim() or value.shape[0] % self.lanes:
            raise _UnlikeError
        parts = value.reshape(self.lanes, -1, *value.shape[1:])
        if not torch.allclose(parts[0], parts[-1], rtol=1e-3, atol=1e-4):
            raise _UnlikeError
        return parts[0]

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Sites give back what was recorded, marked where `mark` says so; inputs of all modules with weights are noted."""
        calls: dict[str, int] = {}
        hooks = []

        def stand_in(name: str) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                self.inputs.setdefault(name, []).append(args[0])
                call = calls.get(name, 0)
                calls[name] = call + 1
                recorded = self.outputs[name]
                one = recorded[call % len(recorded)]
                value = one.repeat(self.lanes, *[1] * (one.dim() - 1))
                return self.mark[name](value) if name in self.mark else value

            return forward

        self.inputs.clear()
        try:
            for name in self.order:
                self.sites[name].forward = stand_in(name)  # type: ignore[method-assign]
            for name, inner in self.names.items():
                if name not in self.order and _owns(inner):
                    hooks.append(inner.register_forward_pre_hook(self._watch(name)))
            yield
        finally:
            for name in self.order:
                self.sites[name].__dict__.pop("forward", None)
            for hook in hooks:
                hook.remove()


class _UnlikeError(Exception):
    """A repeated example does not give repeated activations."""


def _owns(module: nn.Module) -> bool:
    stored = [n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set]
    return bool(stored) or any(p is not None for p in module._parameters.values())


def _has_nan(value: Any) -> bool:
    return any(bool(torch.isnan(t).any()) for t in _tensors(value) if t.is_floating_point())


def _ends(run: _Run, example: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """Axes of each site that are the module's own output or input: they have a fixed width."""
    fixed: dict[str, tuple[int, ...]] = dict.fromkeys(run.order, ())

    def out(name: str) -> int:
        return 1 if isinstance(run.sites[name], nn.Embedding) else 0

    for name in run.order:
        run.mark = {name: lambda value: torch.full_like(value, torch.nan)}
        with run.cut():
            if _has_nan(run(example)):
                fixed[name] += (out(name),)
    run.mark = {}
    marked = tuple(torch.full_like(a, torch.nan) if isinstance(a, Tensor) and a.is_floating_point() else a for a in example)
    with run.cut():
        run(marked)
        for name in run.order:
            if isinstance(run.sites[name], nn.Embedding):
                fixed[name] += (0,)
            elif _has_nan(run.inputs.get(name, [])):
                fixed[name] += (1,)
    return fixed


class _Channels:
    """Which channels meet. Every channel of every site (out and in) and of every norm is a node; marking one output channel with NaN and
    seeing where NaN arrives joins nodes. NaN passes dead rectifiers and zero scales, which a small change would not."""

    def __init__(self, anatomy: TracedAnatomy) -> None:
        self.sites = {site.name: site for site in anatomy.found}
        self.base: dict[tuple[str, str], int] = {}
        self.parent: list[int] = []
        self.unknown: dict[int, str] = {}
        self.names = anatomy.names
        run = self._recorded(anatomy)
        self.run = run
        # modules that share one tensor are one site
        self.site_of = {path: site.name for site in anatomy.found for path in (site.name, *site.context.get("tied", ()))}
        self.norm_names = [name for name, inner in run.names.items() if _is_norm(inner)]
        for name, inner in run.names.items():
            if name in self.site_of or name in self.norm_names or not _owns(inner):
                continue
            if any(True for _ in inner.children()):
                self.hidden = self._first_tensor(name, inner)
        for site in anatomy.found:
            n, m = self._widths(site)
            self._add((site.name, "out"), n)
            self._add((site.name, "in"), m)
        for name in self.norm_names:
            self._add((name, "norm"), self._norm_width(name))
        for site in anatomy.found:
            self._join_grouped(site)
        for name in run.order:
            if name in self.site_of:
                self._trace(name, anatomy.example)

    hidden: str = ""

    def _recorded(self, anatomy: TracedAnatomy) -> _Run:
        for lanes in (LANES, 1):
            run = _Run(anatomy.module)
            run.lanes = lanes
            try:
                with run.real():
                    run(self._repeated(anatomy.example, lanes))
                return run
            except (_UnlikeError, UserError):
                if lanes == 1:
                    raise
        raise AssertionError

    @staticmethod
    def _repeated(example: tuple[Any, ...], lanes: int) -> tuple[Any, ...]:
        return tuple(a.repeat(lanes, *[1] * (a.dim() - 1)) if isinstance(a, Tensor) and a.dim() else a for a in example)

    def _first_tensor(self, name: str, inner: nn.Module) -> str:
        leaf = next(n for n in (*inner._parameters, *inner._buffers) if getattr(inner, n) is not None)
        return f"{name}.{leaf}" if name else leaf

    def _widths(self, site: Site) -> tuple[int, int]:
        """Channels that come out of and go into a site; a table of rows takes none."""
        if isinstance(site.kind, Embedding):
            return site.shape[1], 0
        return site.shape[0], site.shape[1] * int(site.context.get("groups", 1))

    def _norm_width(self, name: str) -> int:
        inner = self.run.names[name]
        return max(t.numel() for t in (*inner._parameters.values(), *inner._buffers.values()) if t is not None)

    def _add(self, key: tuple[str, str], count: int) -> None:
        self.base[key] = len(self.parent)
        self.parent.extend(range(len(self.parent), len(self.parent) + count))

    def _root(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def _join_grouped(self, site: Site) -> None:
        """Inputs and outputs of one group of a grouped convolution stand or fall together."""
        groups = int(site.context.get("groups", 1))
        if groups == 1:
            return
        n, m = self._widths(site)
        out, into = self.base[site.name, "out"], self.base[site.name, "in"]
        for g in range(groups):
            first = out + g * (n // groups)
            for i in range(n // groups):
                self._join(first, out + g * (n // groups) + i)
            for j in range(m // groups):
                self._join(first, into + g * (m // groups) + j)

    def _trace(self, name: str, example: tuple[Any, ...]) -> None:
        """Marks the output channels of the module `name`, a lane each, and joins them with the channels where the marks arrive."""
        run, lanes = self.run, self.run.lanes
        inner = run.sites[name]
        site = self.sites[self.site_of[name]]
        # a tied head's outputs are the table's rows, not its columns
        if isinstance(site.kind, Embedding) != isinstance(inner, nn.Embedding):
            return
        width = self._widths(site)[0]
        axis = 1 if isinstance(inner, nn.Conv1d | nn.Conv2d) else -1
        repeated = self._repeated(example, lanes)
        base = self.base[site.name, "out"]
        for start in range(0, width, lanes):
            count = min(lanes, width - start)

            def mark(value: Tensor, start: int = start, count: int = count) -> Tensor:
                rows = value.reshape(lanes, -1, *value.shape[1:])
                for lane in range(count):
                    rows[lane].select(axis, start + lane).fill_(torch.nan)
                return rows.reshape(value.shape)

            run.mark = {name: mark}
            with run.cut():
                run(repeated)
            for sink, values in run.inputs.items():
                for value in values:
                    if value.is_floating_point():
                        self._arrived(sink, value, base + start, count)
        run.mark = {}

    def _arrived(self, sink: str, value: Tensor, first: int, count: int) -> None:
        inner = self.run.names[sink]
        lanes = self.run.lanes
        value = value.reshape(lanes, -1, *value.shape[1:])[:count]
        last = value.dim() - 1
        if sink in self.site_of:
            site = self.sites[self.site_of[sink]]
            if isinstance(site.kind, Embedding):
                # a tied head reads the table's columns, which are the table's out channels
                base, axis = self.base[site.name, "out"], last
            else:
                base = self.base[site.name, "in"]
                axis = 2 if isinstance(inner, nn.Conv1d | nn.Conv2d) else last
        elif sink in self.norm_names:
            if self._norm_width(sink) == 1:
                # one scale for all channels goes with none of them
                return
            base = self.base[sink, "norm"]
            axis = 2 if CHANNELWISE[type(inner)] == 1 else last
        else:
            for lane in value.flatten(1).sum(1).isnan().nonzero()[:, 0].tolist():
                self.unknown[first + lane] = self._first_tensor(sink, inner)
            return
        # one NaN makes the sum of its channel NaN
        sums = value.sum(tuple(i for i in range(1, last + 1) if i != axis))
        for lane, channel in sums.isnan().nonzero().tolist():
            self._join(first + lane, base + channel)

    @functools.cached_property
    def _axes(self) -> dict[tuple[str, str], list[int]]:
        """Component of each channel of each axis."""
        return {key: [self._root(node) for node in range(self.base[key], self.base[key] + self._size(key))] for key in self.base}

    def _size(self, key: tuple[str, str]) -> int:
        name, side = key
        if side == "norm":
            return self._norm_width(name)
        n, m = self._widths(self.sites[name])
        return n if side == "out" else m

    def _side(self, site: Site, axis: int) -> str:
        if isinstance(site.kind, Embedding):
            return "out" if axis == 1 else ""
        return "out" if axis == 0 else "in"

    def group(self, site: Site, axis: int) -> tuple[Group, tuple[Channelwise, ...]]:
        """The group of a site's axis and the norms that belong to it."""
        if self.hidden:
            raise UserError(
                f"{self.hidden} may act on any channel, as it lies in no module of its own: structured methods need it in a leaf module"
            )
        side = self._side(site, axis)
        if not side:
            # the rows of a table are ids, which meet nothing that a trace can see
            return Group(site.shape[0], (Member(site, axis, IndexMap()),)), ()
        keys = [(site.name, side)]
        components = set(self._axes[keys[0]])
        grown = True
        while grown:
            grown = False
            for key, roots in self._axes.items():
                if key not in keys and components.intersection(roots):
                    keys.append(key)
                    components.update(roots)
                    grown = True
        for node, name in self.unknown.items():
            if self._root(node) in components:
                raise UserError(
                    f"{name} reads the channels of {site.name}, and its kind is unknown: structured methods leave {site.name} out"
                )
        order = self._order(keys, components)
        members, norms = [], []
        for key in sorted(keys, key=lambda key: self.base[key]):
            name, way = key
            index = self._fit(key, order)
            if way == "norm":
                inner = self.run.names[name]
                leaves = [n for n, t in (*inner._parameters.items(), *inner._buffers.items()) if t is not None and t.dim()]
                norms.append(Channelwise(name, tuple(TensorId(self.names[f"{name}.{leaf}"]) for leaf in leaves), index))
                continue
            found = self.sites[name]
            if way == "in" and int(found.context.get("groups", 1)) > 1:
                # the input slices of a grouped convolution go with its output rows
                continue
            members.append(Member(found, 1 if way == "in" or isinstance(found.kind, Embedding) else 0, index))
        return Group(len(order), tuple(members)), tuple(norms)

    def _order(self, keys: list[tuple[str, str]], components: set[int]) -> dict[int, int]:
        """Component -> canonical index, in the order of the axis that meets most of them."""
        widest = max(keys, key=lambda key: (len(set(self._axes[key])), -self.base[key]))
        order: dict[int, int] = {}
        for key in (widest, *keys):
            for root in self._axes[key]:
                order.setdefault(root, len(order))
        return order

    def _fit(self, key: tuple[str, str], order: Mapping[int, int]) -> IndexMap:
        """The IndexMap of one axis: runs of equal length, one after another, from some canonical index on."""
        at = [order[root] for root in self._axes[key]]
        runs: dict[int, int] = {}
        for i in at:
            runs[i] = runs.get(i, 0) + 1
        block = runs[at[0]]
        if at != [at[0] + j // block for j in range(len(at))]:
            raise UserError(
                f"the channels of {key[0]} meet others in an order that offset and block cannot express: structured methods leave it out"
            )
        return IndexMap(offset=-at[0] * block, block=block)
