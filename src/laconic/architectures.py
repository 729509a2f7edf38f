"""What language models of transformers are made of: one row of data for each architecture.

`decoder_anatomy` reads a row of DECODERS and never looks at weights' values. Modules without a row are traced (laconic.anatomy)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from laconic.core.site import (
    Act,
    Anatomy,
    Conv,
    Edge,
    Embedding,
    Fold,
    Gated,
    Group,
    IndexMap,
    Kind,
    Linear,
    Member,
    Norm,
    Paired,
    Rotate,
    Scale,
    Scan,
    Segment,
    Site,
    Stage,
    Sublayer,
    TensorId,
)

SPLIT = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
PRE = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


@dataclass(frozen=True)
class Decoder:
    """Where the parts of one architecture lie, and what it does with them. Paths in `parts`, `norms` and `experts` are relative to a layer,
    the others are whole module paths; "" is absent. Biases need no entry: they are found among the stored tensors.

    parts: q, k, v (or one qkv), o, gate and up (or one gate_up; up alone has no gate), down. norms: attention and mlp before the two
    halves (a path given twice is one norm that both read), attention_out and mlp_out between a half and the stream, q and k over heads.
    by_head: qkv holds q, k and v of one head side by side, head after head, instead of all of q, then all of k, then all of v.
    plus: what norms add to their stored scale. centred: norms take the mean away. norms_first: the config's attribute that says whether
    norms stand before the halves. experts: the module of a layer's experts, a sub-module for each with gate_proj, up_proj, down_proj.

    A state-space layer has scan_in, select (Mamba's x_proj), step (its dt_proj), conv, scan_out and what the scan holds (A, D, step_bias,
    scan_norm); `lanes` says what lies side by side along an axis (0 = out, 1 = in) of each: x and gate of the channels, B and C of the
    states, dt of the heads, low of the rank that steps are made from. opened: a Part stands for each mixer that runs the step projection
    as a module and shows the operands of the scan's product."""

    blocks: str = "model.layers"
    parts: Mapping[str, str] = field(default_factory=lambda: {**SPLIT, **GATED})
    norms: Mapping[str, str] = field(default_factory=lambda: PRE)
    embed: str = "model.embed_tokens"
    positions: str = ""
    into: str = ""
    out: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    by_head: bool = False
    transposed: bool = False
    plus: float = 0.0
    centred: bool = False
    norms_first: str = ""
    experts: str = ""
    router: str = ""
    lanes: Mapping[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    opened: bool = False


HEAD_NORMS = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
SANDWICH = {
    "attention": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
MIXTURE = Decoder(experts="mlp.experts", router="mlp.gate")

SCAN = {"scan_in": "mixer.in_proj", "conv": "mixer.conv1d", "A": "mixer.A_log", "D": "mixer.D", "scan_out": "mixer.out_proj"}
STATE_SPACE = Decoder(blocks="backbone.layers", norms={"scan": "norm"}, embed="backbone.embeddings", norm="backbone.norm_f")

# keyed by `model_type` of config.json
DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(norms={**PRE, **HEAD_NORMS}),
    "gemma": Decoder(plus=1.0),
    "gemma2": Decoder(norms=SANDWICH, plus=1.0),
    "gemma3_text": Decoder(norms={**SANDWICH, **HEAD_NORMS}, plus=1.0),
    "phi": Decoder(
        parts={**SPLIT, "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
        norms={"attention": "input_layernorm", "mlp": "input_layernorm", "q": "self_attn.q_layernorm", "k": "self_attn.k_layernorm"},
        norm="model.final_layernorm",
        centred=True,
    ),
    "phi3": Decoder(
        parts={"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
    ),
    "gpt2": Decoder(
        blocks="transformer.h",
        parts={"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        norms={"attention": "ln_1", "mlp": "ln_2"},
        embed="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        transposed=True,
        centred=True,
    ),
    "gpt_neox": Decoder(
        blocks="gpt_neox.layers",
        parts={"qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        embed="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        by_head=True,
        centred=True,
    ),
    "opt": Decoder(
        blocks="model.decoder.layers",
        parts={**SPLIT, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
        norms={"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        into="model.decoder.project_in",
        out="model.decoder.project_out",
        norm="model.decoder.final_layer_norm",
        centred=True,
        norms_first="do_layer_norm_before",
    ),
    "mixtral": MIXTURE,
    "qwen3_moe": replace(MIXTURE, norms={**PRE, **HEAD_NORMS}),
    "mamba": replace(
        STATE_SPACE,
        parts={**SCAN, "select": "mixer.x_proj", "step": "mixer.dt_proj"},
        lanes={
            ("scan_in", 0): ("x", "gate"),
            ("conv", 0): ("x",),
            ("select", 1): ("x",),
            ("select", 0): ("low", "B", "C"),
            ("step", 1): ("low",),
            ("step", 0): ("x",),
            ("A", 0): ("x",),
            ("A", 1): ("B",),
            ("D", 0): ("x",),
            ("scan_out", 1): ("x",),
        },
    ),
    "mamba2": replace(
        STATE_SPACE,
        parts={**SCAN, "step_bias": "mixer.dt_bias", "scan_norm": "mixer.norm"},
        lanes={
            ("scan_in", 0): ("gate", "x", "B", "C", "dt"),
            ("conv", 0): ("x", "B", "C"),
            ("step_bias", 0): ("dt",),
            ("A", 0): ("dt",),
            ("D", 0): ("dt",),
            ("scan_norm", 0): ("x",),
            ("scan_out", 1): ("x",),
        },
    ),
}

# sites of one stage see the same input
STAGES = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",), ("scan_in",), ("select",), ("step",), ("scan_out",))
# parts of a state-space layer that its own arithmetic reads without calling a module: no method is offered them
HELD = {"conv": Conv(), "step": Linear(), "A": Scan(), "D": Scan(), "step_bias": Scan(), "scan_norm": Norm()}
ATTENTION = ("q", "k", "v", "qkv", "o")
READERS = {**dict.fromkeys(("q", "k", "v", "qkv"), "attention"), **dict.fromkeys(("gate", "up", "gate_up"), "mlp"), "scan_in": "scan"}
WRITERS = ("o", "down", "scan_out")
# what is said of matrices that no method is offered
WHY = {
    "router": "a router, which chooses experts by small differences",
    "positions": "learned positions",
    "into": "a projection of the embedding",
    "out": "a projection before the head",
    "conv": "read by the scan itself",
    "step": "read by the scan itself",
    "A": "held by the scan",
}
# activations for which act(c x) = c act(x) where c > 0
HOMOGENEOUS = ("relu", "leaky_relu")


class Port(NamedTuple):
    """Where one logical matrix lies along an axis of a site: unit i (a head, a channel) has `block` indices from offset + i * stride on."""

    site: Site
    axis: int
    offset: int
    stride: int
    block: int

    def __call__(self, i: int) -> range:
        start = self.offset + i * self.stride
        return range(start, start + self.block)


def _index(width: int, units: int, of: Callable[[int], Sequence[int]]) -> IndexMap:
    """The map of `of`: unit -> indices; an offset and a block where they say it all, else a table."""
    table = tuple(tuple(of(i)) for i in range(units))
    if table and table[0]:
        start, block = table[0][0], len(table[0])
        if all(list(entry) == list(range(start + i * block, start + (i + 1) * block)) for i, entry in enumerate(table)):
            return IndexMap(width, start, block)
    return IndexMap(width, table=table)


def _members(ports: Sequence[Port], units: int) -> tuple[Member, ...]:
    """One member for each site and axis, with the slices of all its ports together."""
    found: dict[tuple[str, int], list[Port]] = {}
    for port in ports:
        found.setdefault((port.site.name, port.axis), []).append(port)

    def indices(some: list[Port]) -> Callable[[int], Sequence[int]]:
        return lambda i: [j for port in some for j in port(i)]

    return tuple(Member(some[0].site, axis, _index(some[0].site.shape[axis], units, indices(some))) for (_, axis), some in found.items())


class Lane(NamedTuple):
    """What lies side by side along axes of a state-space layer: `copies` times `units` runs of `block` indices; lanes of one family fall
    together, unit by unit. (Heads of Mamba-2 are in groups of equal size, so a unit is one head of each group.)"""

    family: str
    units: int
    copies: int
    block: int

    @property
    def width(self) -> int:
        return self.copies * self.units * self.block

    def __call__(self, i: int) -> list[int]:
        starts = [(copy * self.units + i) * self.block for copy in range(self.copies)]
        return [j for start in starts for j in range(start, start + self.block)]


@dataclass(frozen=True)
class DecoderAnatomy(Anatomy):
    """A stack of equal layers between an embedding and a head. Sites that no method is offered (norms, positions, routers) are in `named`
    all the same, so that groups and edges can name them. `folds`: each norm's name -> the readers that may take in its scale."""

    row: Decoder
    heads: int
    kv_heads: int
    head_dim: int
    act: Act | None
    shapes: Mapping[str, tuple[int, ...]]
    _segments: tuple[Segment, ...]
    named: Mapping[str, Site]
    folds: Mapping[str, tuple[str, ...]]
    lanes: Mapping[str, Lane] = field(default_factory=dict)
    halves: tuple[Site, ...] = ()
    # rotary pairs of a head
    pairs: int = 0

    def sublayers(self) -> tuple[Site, ...]:
        return self.halves

    @property
    def tail(self) -> tuple[Site, ...]:
        """The embedding, and the head where it is not tied."""
        return self._segments[-1].sites

    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that are no site's weight: norms, biases, positions, routers, and what the architecture does not use."""
        covered = {site.tensors["weight"].name for site in self.sites()}
        return tuple(name for name in self.shapes if name not in covered)

    def why(self, tensor: str) -> str:
        """In a few words, why no site covers a stored tensor."""
        parts = {id.name: site.roles["part"] for site in self.named.values() for id in site.tensors.values()}
        return WHY.get(parts.get(tensor, ""), "its architecture's row does not name it")

    def coupled(self, site: Site, axis: int) -> Group:
        """MLP channels, KV heads with the query heads they serve, channels, heads, states and ranks of a scan, the residual stream's width,
        experts, positions, or the vocabulary."""
        part = site.roles["part"]
        if (part, axis) in self.row.lanes:
            return self._scan(site, axis)
        if (part, axis) in (("gate", 0), ("up", 0), ("gate_up", 0), ("down", 1)):
            ports = self._mlp(site)
            units = ports["down"].site.shape[1]
            return Group(units, _members(list(ports.values()), units))
        if (part, axis) in (("q", 0), ("k", 0), ("v", 0), ("qkv", 0), ("o", 1)):
            units = self._heads(site.context["layer"])[1]
            return Group(units, _members(list(self._attention(site.context["layer"]).values()), units))
        if part == "router" and axis == 0:
            return self._experts(site)
        if part == "positions" and axis == 0:
            return Group(site.shape[0], (Member(site, 0, IndexMap(site.shape[0])),), fixed=True)
        if part in ("embed", "head") and axis == 0:
            return Group(site.shape[0], tuple(Member(s, 0, IndexMap(s.shape[0])) for s in self.tail), fixed=True)
        inner = part in ("into", "out")
        if (part in ("embed", "head") and self._projected) or (inner and axis == (1 if part == "into" else 0)):
            ends = [(s, 1) for s in self.tail] + [(s, 1 if s.roles["part"] == "into" else 0) for s in self._of("into", "out")]
            return Group(self.tail[0].shape[1], tuple(Member(s, at, IndexMap(s.shape[at])) for s, at in ends))
        stream = self._stream
        return Group(stream[0].index.width, stream)

    def edges(self) -> Iterator[Edge]:
        """The residual stream; in each layer up -> down, v -> o and k against q. `width` of the last two is v's and k's: an entry of v
        feeds the same entry of each query head that its head serves, and one of k meets it. Of a scan: the ranks that steps are made from,
        B against C, the gate against what reads behind it, the norm behind the gate. Then, from each norm to all that reads it, what it
        gives: no one else hears of a scale there."""
        members = self._stream
        writers = tuple(m for m in members if m.site.roles["stream"] in ("writes", "both"))
        readers = tuple(m for m in members if m.site.roles["stream"] in ("reads", "both"))
        folds = tuple(
            Fold(m.site, tuple(r for r in readers if r.site.name in self.folds[m.site.name]))
            for m in members
            if isinstance(m.site.kind, Norm)
        )
        width = members[0].index.width
        # a scale that stays between the stream and a reader, or between a writer and the stream, does not commute with a rotation
        turns = (Rotate(self.row.centred),) if all(fold.readers for fold in folds) else ()
        yield Edge("residual", width, width, writers, readers, folds, turns)
        for segment in self._segments[:-1]:
            for site in segment.sites:
                if site.roles["part"] == "down":
                    ports = self._mlp(site)
                    up, n = ports["up"], site.shape[1]
                    within = site.name.rpartition(".")[0].removesuffix(".mlp")
                    allows = (self.act,) if self.act else ()
                    yield Edge(f"{within}.gate", n, n, _members([up], n), (Member(site, 1, IndexMap(n)),), allows=allows)
                if site.roles["part"] == "o":
                    yield self._value(segment.name, site)
                    yield from self._keys(segment.name, site)
                if site.roles["part"] == "scan_out":
                    yield from self._scan_edges(segment.name, site)
        for fold in folds:
            if fold.readers:
                yield Edge(fold.norm.name, width, width, (Member(fold.norm, 0, IndexMap(width)),), fold.readers, allows=(Scale(),))

    def _value(self, prefix: str, o: Site) -> Edge:
        ports = self._attention(o.context["layer"])
        v, hd, served = ports["v"], self.head_dim, self.heads // self.kv_heads
        width = self._heads(o.context["layer"])[1] * hd

        def written(c: int) -> Sequence[int]:
            return (v(c // hd)[c % hd],)

        def read(c: int) -> Sequence[int]:
            return [(c // hd * served + s) * hd + c % hd for s in range(served)]

        writer = Member(v.site, 0, _index(v.site.shape[0], width, written))
        return Edge(f"{prefix}.value", width, hd, (writer,), (Member(o, 1, _index(o.shape[1], width, read)),), allows=(Scale(), Rotate()))

    def _keys(self, prefix: str, o: Site) -> Iterator[Edge]:
        """Keys against queries, where no norm of theirs comes in between."""
        ports = self._attention(o.context["layer"])
        q, k, hd, served = ports["q"], ports["k"], self.head_dim, self.heads // self.kv_heads
        if {"head_norm"} & (q.site.context.keys() | k.site.context.keys()):
            return
        width = self._heads(o.context["layer"])[1] * hd

        def written(c: int) -> Sequence[int]:
            return (k(c // hd)[c % hd],)

        def read(c: int) -> Sequence[int]:
            return [q(c // hd)[s * hd + c % hd] for s in range(served)]

        key = Member(k.site, 0, _index(k.site.shape[0], width, written))
        query = Member(q.site, 0, _index(q.site.shape[0], width, read))
        yield Edge(f"{prefix}.keys", width, hd, (key,), (query,), allows=(Paired(self.pairs),))

    def _lane_map(self, site: Site, axis: int, lane: str) -> IndexMap:
        """Where one lane lies along an axis, entry by entry."""
        start = 0
        for other in self.row.lanes[site.roles["part"], axis]:
            if other == lane:
                break
            start += self.lanes[other].width
        width = site.shape[axis]
        return IndexMap(width, start) if start == 0 else _index(width, self.lanes[lane].width, lambda i: (start + i,))

    def _scan(self, site: Site, axis: int) -> Group:
        """All families of lanes that share an axis with those of the site's, one after another."""
        sites = self._parts[site.context["layer"], None]
        keys = [key for key in self.row.lanes if key[0] in sites]
        of = {key: {self.lanes[lane].family for lane in self.row.lanes[key]} for key in keys}
        families = set(of[site.roles["part"], axis])
        while grown := set().union(*(found for found in of.values() if found & families)) - families:
            families |= grown
        units = {lane.family: lane.units for lane in self.lanes.values() if lane.family in families}
        table = [(family, i) for family in units for i in range(units[family])]
        members = []
        for key in keys:
            if of[key] & families:
                member = sites[key[0]]
                starts, start = [], 0
                for name in self.row.lanes[key]:
                    starts.append((self.lanes[name], start))
                    start += self.lanes[name].width
                rows = [[at + j for lane, at in starts if lane.family == family for j in lane(i)] for family, i in table]
                members.append(Member(member, key[1], _index(member.shape[key[1]], len(table), rows.__getitem__)))
        return Group(len(table), tuple(members))

    def _scan_edges(self, prefix: str, out: Site) -> Iterator[Edge]:
        sites = self._parts[out.context["layer"], None]
        if (select := sites.get("select")) is not None:
            rank, states = self.lanes["low"].width, self.lanes["B"].width
            low = Member(select, 0, self._lane_map(select, 0, "low"))
            yield Edge(f"{prefix}.step", rank, rank, (low,), (Member(sites["step"], 1, IndexMap(rank)),), allows=(Scale(), Rotate()))
            b, c = (Member(select, 0, self._lane_map(select, 0, lane)) for lane in ("B", "C"))
            # each state decays at a rate of its own, so states may be scaled and not mixed
            mixer, layer = out.name.rpartition(".")[0], {"layer": out.context["layer"]}
            shown = tuple(Site(f"{mixer}.{name}", Scan(), {}, (1, states), {"part": name}, layer) for name in ("state", "readout"))
            yield Edge(f"{prefix}.scan", states, states, (b,), (c,), allows=(Scale(),), operands=shown if self.row.opened else ())
            gate = Member(sites["scan_in"], 0, self._lane_map(sites["scan_in"], 0, "gate"))
            inner = out.shape[1]
            yield Edge(f"{prefix}.output", inner, inner, (gate,), (Member(out, 1, IndexMap(inner)),), allows=(Gated(mixer),))
        if (norm := sites.get("scan_norm")) is not None:
            reader = Member(out, 1, IndexMap(out.shape[1]))
            yield Edge(f"{prefix}.gate", out.shape[1], out.shape[1], (), (reader,), (Fold(norm, (reader,)),))

    @property
    def _projected(self) -> bool:
        """Whether the embedding has a width of its own, with a projection into the stream."""
        return any(site.roles["part"] == "into" for site in self.named.values())

    def _of(self, *parts: str) -> list[Site]:
        return [site for site in self.named.values() if site.roles["part"] in parts]

    @property
    def _stream(self) -> tuple[Member, ...]:
        """All that reads or writes the residual stream."""
        found = []
        for site in self.named.values():
            if "stream" in site.roles:
                table, norm = isinstance(site.kind, Embedding), isinstance(site.kind, Norm)
                axis = 0 if norm else 1 if table or site.roles["stream"] == "reads" else 0
                found.append(Member(site, axis, IndexMap(site.shape[axis])))
        return tuple(found)

    @functools.cached_property
    def _parts(self) -> Mapping[tuple[Any, Any], Mapping[str, Site]]:
        """Sites by part, of each layer and of each expert of one."""
        found: dict[tuple[Any, Any], dict[str, Site]] = {}
        for site in self.named.values():
            found.setdefault((site.context.get("layer"), site.context.get("expert")), {})[site.roles["part"]] = site
        return found

    def _mlp(self, site: Site) -> dict[str, Port]:
        """gate (where there is one), up and down of the layer or expert that a site belongs to; units are channels."""
        found = self._parts[site.context["layer"], site.context.get("expert")]
        if (fused := found.get("gate_up")) is not None:
            half = fused.shape[0] // 2
            ports = {"gate": Port(fused, 0, 0, 1, 1), "up": Port(fused, 0, half, 1, 1)}
        else:
            ports = {part: Port(found[part], 0, 0, 1, 1) for part in ("gate", "up") if part in found}
        return ports | {"down": Port(found["down"], 1, 0, 1, 1)}

    def _heads(self, layer: int) -> tuple[int, int]:
        """Query heads and KV heads that a layer has: fewer than the config says where some were cut."""
        heads = self._parts[layer, None]["o"].shape[1] // self.head_dim
        return heads, heads * self.kv_heads // self.heads

    def _attention(self, layer: int) -> dict[str, Port]:
        """q, k, v and o of a layer; units are KV heads with the query heads that they serve."""
        found = self._parts[layer, None]
        d, served = self.head_dim, self.heads // self.kv_heads
        heads, kv_heads = self._heads(layer)
        wide = d * served
        o = Port(found["o"], 1, 0, wide, wide)
        if (qkv := found.get("qkv")) is None:
            return {"q": Port(found["q"], 0, 0, wide, wide), "k": Port(found["k"], 0, 0, d, d), "v": Port(found["v"], 0, 0, d, d), "o": o}
        if self.row.by_head:
            return {"q": Port(qkv, 0, 0, 3 * d, d), "k": Port(qkv, 0, d, 3 * d, d), "v": Port(qkv, 0, 2 * d, 3 * d, d), "o": o}
        first, second = heads * d, (heads + kv_heads) * d
        return {"q": Port(qkv, 0, 0, wide, wide), "k": Port(qkv, 0, first, d, d), "v": Port(qkv, 0, second, d, d), "o": o}

    def _experts(self, router: Site) -> Group:
        """A router's row and all matrices of the expert it stands for."""
        count = router.shape[0]
        members = [Member(router, 0, IndexMap(count))]
        for site in self.named.values():
            if site.context.get("layer") == router.context["layer"] and "expert" in site.context:
                rows = tuple(range(site.shape[0]))
                table = tuple(rows if e == site.context["expert"] else () for e in range(count))
                members.append(Member(site, 0, IndexMap(site.shape[0], table=table)))
        return Group(count, tuple(members))


class _Builder:
    """Makes sites from a row and the names and shapes of what is stored."""

    def __init__(self, row: Decoder, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]) -> None:
        self.row, self.shapes, self.stored = row, shapes, stored
        self.named: dict[str, Site] = {}
        self.folds: dict[str, tuple[str, ...]] = {}

    def has(self, path: str) -> bool:
        return bool(path) and f"{path}.weight" in self.stored

    def site(self, path: str, kind: Kind, part: str, stream: str = "", **context: Any) -> Site:
        """A site at a module path, or at a bare parameter's; matrices of the layers are transposed where the row says so."""
        tensors = {role: TensorId(self.stored[f"{path}.{role}"]) for role in ("weight", "bias") if f"{path}.{role}" in self.stored}
        if path in self.stored:
            tensors = {"weight": TensorId(self.stored[path])}
        shape = tuple(self.shapes[tensors["weight"].name])
        turned = self.row.transposed and part in {*READERS, *WRITERS}
        roles = {"part": part} | ({"stream": stream} if stream else {})
        made = Site(path, kind, tensors, shape[::-1] if turned else shape, roles, context, turned)
        self.named[path] = made
        return made

    def norm(self, path: str, readers: Sequence[str], **context: Any) -> None:
        """A norm on the stream, and the readers that may take its scale in."""
        if self.has(path):
            if path not in self.named:
                self.site(path, Norm(), "norm", "norm", plus=self.row.plus, centred=self.row.centred, **context)
            self.folds[path] = (*self.folds.get(path, ()), *readers)


def decoder_anatomy(row: Decoder, config: Any, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]) -> DecoderAnatomy:
    """config: of transformers; shapes: of all stored tensors; stored: parameter name in the module -> stored name."""
    heads = int(getattr(config, "num_attention_heads", 1))
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    build = _Builder(row, shapes, stored)
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    first = not row.norms_first or bool(getattr(config, row.norms_first))
    tied = stored[f"{row.embed}.weight"] == stored[f"{row.head}.weight"]
    projected = build.has(row.into)
    # the stream's order is that of execution
    stem = "" if projected else "both" if tied else "writes"
    embed = build.site(row.embed, Embedding(), "embed", stem)
    if tied:
        embed = build.named[row.embed] = embed._replace(roles={**embed.roles, "tied": row.head})
    if projected:
        build.site(row.into, Linear(), "into", "writes")
    if build.has(row.positions):
        build.site(row.positions, Embedding(), "positions", "writes")
    segments: list[Segment] = []
    halves: list[Site] = []
    # where a stored tensor lies in the module; an unused one lies where its own name says
    home = {found: parameter for parameter, found in stored.items()}
    taken: set[str] = set()
    for i in range(int(config.num_hidden_layers)):
        prefix = f"{row.blocks}.{i}"
        stages = _layer(build, prefix, i, attention, first, chosen)
        tensors = tuple(name for name in shapes if home.get(name, name).startswith(f"{prefix}."))
        taken.update(tensors)
        halves += _halves(build, prefix, i, {home.get(name, name): name for name in tensors}) if first else []
        segments.append(Segment(prefix, tuple(stages), tensors))
    last = [] if tied or projected else [row.head]
    if build.has(row.out):
        last = [row.out]
    build.norm(row.norm, last)
    if build.has(row.out):
        build.site(row.out, Linear(), "out", "reads")
    tail = [embed]
    if not tied:
        tail.append(build.site(row.head, Linear(), "head", "" if projected else "reads"))
    segments.append(Segment("", tuple(Stage((s,)) for s in tail), tuple(name for name in shapes if name not in taken)))
    words = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
    gated = any(part in row.parts for part in ("gate", "gate_up"))
    act = Scale() if gated else Scale(positive=True) if next((w for w in words if w), "") in HOMOGENEOUS else None
    lanes = _lanes(build, config)
    pairs = rotary_pairs(config, head_dim)
    return DecoderAnatomy(
        row, heads, kv_heads, head_dim, act, shapes, tuple(segments), build.named, build.folds, lanes, tuple(halves), pairs
    )


def rotary_pairs(config: Any, width: int) -> int:
    """How many pairs of a head's `width` channels positions turn."""
    rope = getattr(config, "rope_parameters", None)
    return int(width * float(rope.get("partial_rotary_factor") or 1.0)) // 2 if rope else 0


def _lanes(build: _Builder, config: Any) -> dict[str, Lane]:
    """Sizes of a scan's lanes: Mamba's channels are each on their own, Mamba-2's are in heads, and its heads in groups."""
    sites = {site.roles["part"]: site for site in build.named.values() if site.context.get("layer") == 0}
    if not build.row.lanes:
        return {}
    inner = sites["scan_out"].shape[1]
    if "select" in sites:
        states, rank = sites["A"].shape[1], sites["step"].shape[1]
        channel, state = Lane("channel", inner, 1, 1), Lane("state", states, 1, 1)
        return {"x": channel, "gate": channel, "B": state, "C": state, "low": Lane("rank", rank, 1, 1)}
    heads, groups, states = sites["A"].shape[0], int(config.n_groups), int(config.state_size)
    head, state = Lane("head", heads // groups, groups, inner // heads), Lane("state", states, groups, 1)
    return {"x": head, "gate": head, "B": state, "C": state, "dt": head._replace(block=1)}


def _layer(build: _Builder, prefix: str, i: int, attention: Mapping[str, int], first: bool, chosen: int) -> list[Stage]:
    """Sites, norms and stages of one layer; `chosen` experts see each token."""
    row = build.row
    paths = {part: f"{prefix}.{path}" for part, path in row.norms.items()}
    mixture = bool(row.experts) and build.has(f"{prefix}.{row.experts}.0.down_proj")
    for half in ("attention", "mlp", "scan"):
        if half not in paths:
            continue
        # a norm behind the sum goes on in the stream, so no reader may take its scale in
        readers = [f"{prefix}.{row.parts[part]}" for part, of in READERS.items() if of == half and part in row.parts and first]
        if half == "mlp" and mixture:
            readers = [f"{prefix}.{row.router}", *_experts_of(build, prefix, ("gate_proj", "up_proj"))]
        build.norm(paths[half], readers, layer=i)
        if f"{half}_out" in paths:
            build.norm(paths[f"{half}_out"], (), layer=i)
    for part, kind in HELD.items():
        if part in row.parts and not (part == "step" and row.opened):
            more: dict[str, Any] = {"plus": row.plus, "centred": row.centred} if isinstance(kind, Norm) else {}
            build.site(f"{prefix}.{row.parts[part]}", kind, part, layer=i, **more)
    stages = []
    for parts in STAGES:
        half = READERS.get(parts[0], "")
        if mixture and parts[0] in ("gate", "down"):
            if parts[0] == "gate":
                build.site(f"{prefix}.{row.router}", Linear(), "router", "reads", layer=i)
            some = [part for part in parts if part in GATED]
            stages += _expert_stages(build, prefix, some, "reads" if half else "writes", layer=i, chosen=chosen)
            continue
        members = []
        for part in parts:
            if part not in row.parts or (part in HELD and not row.opened):
                continue
            context: dict[str, Any] = {"layer": i, **(attention if part in ATTENTION else {})}
            if part in paths and build.has(paths[part]):
                context["head_norm"] = build.stored[f"{paths[part]}.weight"]
            stream = "reads" if part in READERS else "writes" if part in WRITERS else ""
            members.append(build.site(f"{prefix}.{row.parts[part]}", Linear(), part, stream, **context))
        if members:
            stages.append(Stage(tuple(members)))
    return stages


def _halves(build: _Builder, prefix: str, i: int, tensors: Mapping[str, str]) -> Iterator[Site]:
    """The attention and the feed-forward half of a layer where each is a module of its own; tensors: parameter -> stored name. A norm that
    both read stays with neither."""
    row = build.row
    paths = {part: f"{prefix}.{path}" for part, path in row.norms.items()}
    mlp = row.experts or row.parts.get("down", "")
    for half, inside in (("attention", row.parts.get("o", "")), ("mlp", mlp)):
        path, _, _ = inside.rpartition(".")
        if not path or half not in paths:
            continue
        module = f"{prefix}.{path}"
        other = paths.get("mlp" if half == "attention" else "attention")
        around = (paths[name] for name in (half, f"{half}_out") if name in paths)
        norms = tuple(norm for norm in around if norm != other and build.has(norm))
        under = tuple(f"{own}." for own in (module, *norms))
        owned = {name: TensorId(stored) for name, stored in tensors.items() if name.startswith(under)}
        writers = tuple(
            site.name for site in build.named.values() if site.name.startswith(f"{module}.") and site.roles.get("stream") == "writes"
        )
        context = {"layer": i, "norms": norms, "writers": writers, "outputs": 2 if half == "attention" else 0}
        if owned and writers:
            count = sum(math.prod(build.shapes[tensor.name]) for tensor in owned.values())
            yield Site(module, Sublayer(), owned, (count,), {"part": half}, context)


def _experts_of(build: _Builder, prefix: str, leaves: Sequence[str]) -> list[str]:
    found = []
    e = 0
    while build.has(f"{prefix}.{build.row.experts}.{e}.{leaves[0]}"):
        found += [f"{prefix}.{build.row.experts}.{e}.{leaf}" for leaf in leaves]
        e += 1
    return found


def _expert_stages(build: _Builder, prefix: str, parts: Sequence[str], stream: str, **context: int) -> list[Stage]:
    """A stage for each expert; one pass may serve them all, as none sees what another computes."""
    stages: list[Stage] = []
    leaves = [f"{part}_proj" for part in parts]
    paths = _experts_of(build, prefix, leaves)
    for e in range(len(paths) // len(parts)):
        some = zip(parts, paths[e * len(parts) : (e + 1) * len(parts)], strict=True)
        stages.append(Stage(tuple(build.site(path, Linear(), part, stream, expert=e, **context) for part, path in some), beside=e > 0))
    return stages
