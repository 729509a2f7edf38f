"""A decoder as a tape of native steps: a Stack without transformers' forward pass between its products, for text by text and for batches of
equal lengths.

Steps run over buffers of fp32 in one native call (kernels/cpu/tape.cpp). What has no native step is done by the model's own modules in
between: products of other forms, or of so many rows that torch is quicker, and attention of a prompt to itself. Keys and values lie in
pages, in the model's dtype, and what is not settled is written over. A model is taken only where the tape gives its logits on a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from laconic.architectures import DECODERS, GATED, SPLIT
from laconic.core.decoder import Answer, Stack
from laconic.core.errors import UserError
from laconic.core.packed import Dense, Held
from laconic.core.router import Routed, Skips, asking
from laconic.core.state import State
from laconic.decoding import Pending
from laconic.kernels.attention import MOST
from laconic.kernels.blocks import block_attention, causal_attention
from laconic.kernels.linear import even, rows_for
from laconic.kernels.native import native
from laconic.runtime import fitted, own_layers, pattern_of

# the architectures whose layers are what a tape can hold: norm, attention, norm, feed-forward
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
# rotary embeddings whose angles do not depend on how long the text is
STEADY = ("default", "linear", "llama3", "yarn")
PAGE = 256
# rows that a matrix held as it is is multiplied with here: torch is quicker for more
FEW = 3
# tokens of a prompt that are read together
PROMPT = 1024
TRIAL = 5
# the greatest difference of logits to the model's own, as a share of the greatest logit: by dtype, and where products round their inputs,
# since a sum in another order may fall on the other side of a step
NEAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
ROUNDED = 5e-2
# buffers: the stream, what a norm gives, queries, keys, values, what attention gives, gate, up, what a half adds, logits
STREAM, NORMED, QUERY, KEYS, VALUES, MIXED, GATE, UP, OUT, LOGITS = range(10)


class Layer(NamedTuple):
    """The modules of one layer that a tape needs. gate, up, down: None where the feed-forward layer `mlp` is another than a gated one
    (experts, a part that stands in its place) and runs as a whole."""

    before: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    between: nn.Module
    mlp: nn.Module
    gate: nn.Module | None = None
    up: nn.Module | None = None
    down: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


def _layers(model: Any) -> list[Layer]:
    """A model's layers; ValueError, with the reason, where a tape cannot hold them."""
    config, decoder = model.config, model.get_decoder()
    row = DECODERS.get(config.model_type)
    if config.model_type not in KNOWN or row is None:
        raise ValueError(f"no tape is known for {config.model_type}")
    if any(type(layer).__name__ != "DynamicLayer" for layer in own_layers(model)):
        raise ValueError("some of its layers do not attend to all past tokens")
    if config.rope_parameters.get("rope_type", "default") not in STEADY:
        raise ValueError(f"its rotary embedding is {config.rope_parameters['rope_type']}")
    kind, found = config.model_type.replace("_", ""), []
    for layer in decoder.layers:
        if type(layer.self_attn).__name__.lower() != f"{kind}attention":
            raise ValueError(f"{type(layer.self_attn).__name__} stands for attention in one of its layers")
        gated = type(layer.mlp).__name__.lower() == f"{kind}mlp" and config.hidden_act in ("silu", "swish")
        parts = {name: row.parts[name] for name in (SPLIT | GATED if gated else SPLIT)}
        heads = {f"{name}_norm": row.norms[name] for name in ("q", "k") if name in row.norms}
        named = {**parts, **heads, "before": row.norms["attention"], "between": row.norms["mlp"], "mlp": "mlp"}
        one = Layer(**{name: layer.get_submodule(path) for name, path in named.items()})
        if not all(isinstance(getattr(one, name), (nn.Linear, Held, Routed)) for name in parts):
            raise ValueError("some of its matrices are held in other modules")
        if not all(hasattr(norm, "variance_epsilon") for norm in (one.before, one.between)):
            raise ValueError("its norms are not root mean squares")
        found.append(one)
    return found


def _middle(layer: Layer) -> int:
    """Neurons that its buffers hold."""
    if isinstance(layer.mlp, Routed):
        return 0 if (found := layer.mlp.skips()) is None else found.down.shape[1]
    return 0 if layer.up is None else _width(layer.up)[0]


def _width(module: nn.Module) -> tuple[int, int]:
    """(n, m) of a linear layer."""
    weight: Any = module.weight
    return tuple(weight.matrix) if isinstance(module, Held) else tuple(weight.shape)  # type: ignore[return-value]


def _fitting(layer: Layer, hidden: int, d: int) -> tuple[int, int]:
    """Query heads and heads of keys of a layer whose widths fit each other; ValueError where they do not."""
    h, k = _width(layer.q)[0] // d, _width(layer.k)[0] // d
    wanted = {"q": (h * d, hidden), "k": (k * d, hidden), "v": (k * d, hidden), "o": (hidden, h * d)}
    if layer.up is not None:
        middle = _width(layer.up)[0]
        wanted |= {"gate": (middle, hidden), "up": (middle, hidden), "down": (hidden, middle)}
    norms = {"before": hidden, "between": hidden, "q_norm": d, "k_norm": d}
    fit = all(_width(getattr(layer, name)) == shape for name, shape in wanted.items())
    found: Any = {name: getattr(layer, name) for name in norms}
    if not fit or not k or h % k or d % 2 or any(norm is not None and norm.weight.numel() != norms[name] for name, norm in found.items()):
        raise ValueError("the widths of its layers do not fit each other")
    return h, k


class Told(NamedTuple):
    """What a step does, and the stored bytes that it reads each time."""

    what: str
    nbytes: int = 0


class Spent(NamedTuple):
    """Where time goes: what is done, by whom, how often in a pass, milliseconds of a pass, stored bytes read in it."""

    what: str
    by: str
    times: int
    ms: float
    nbytes: int


def _matrix(module: Any) -> Tensor | None:
    """The weight of a linear layer (n, m) where it is held, and multiplied with, as it is."""
    if isinstance(module, Routed):
        return None
    if not isinstance(module, Held):
        return cast(Tensor, module.weight.detach())
    if module._copy is not None:
        return module._copy
    return module.weight.value if isinstance(module.weight, Dense) else None


class Steps(Stack):
    """A decoder of KNOWN over pages of keys and values. ValueError, with the reason, for what no tape can hold.

    state: an empty State, for attention of `parts` that stand beside the model, and for the model's own where it `holds` the past."""

    def __init__(
        self, model: nn.Module, state: State | None = None, parts: Mapping[str, nn.Module] | None = None, holds: bool = False
    ) -> None:
        there = native()
        self.model = whole = cast(Any, model)
        if not hasattr(model, "get_decoder") or getattr(model, "config", None) is None:
            raise ValueError(f"{type(model).__name__} is no decoder of transformers")
        if there is None:
            raise ValueError("there are no native kernels")
        stored = next(model.parameters(), torch.empty(0))
        self.dtype = whole.get_decoder().norm.weight.dtype
        if stored.device.type != "cpu" or self.dtype not in NEAR:
            raise ValueError(f"the model is on {stored.device.type} in {self.dtype}")
        self._level = there.level
        self.layers = _layers(whole)
        self.parts = dict(parts or {})
        self._past = None if state is None else Pending(len(self.layers), fitted(state, model))
        if holds and state is None:
            raise ValueError("there is no State that could hold the past")
        self._holds = holds
        config = whole.config
        self._hidden = config.hidden_size
        self.head_norm = whole.get_decoder().norm
        self._d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # query heads and heads of keys, of each layer
        self._heads = [_fitting(layer, self._hidden, self._d) for layer in self.layers]
        self._table, self._out = whole.get_input_embeddings(), whole.get_output_embeddings()
        if not isinstance(self._out, (nn.Linear, Held)) or {_width(self._out)[1], self.head_norm.weight.numel()} != {self._hidden}:
            raise ValueError("its head does not fit its layers")
        self.length = self.layer_passes = self.part_passes = 0
        self._waiting: dict[int, int] = {}
        self._keep: list[Tensor] = []
        self._tape = there.module.Tape(there.level, self.dtype == torch.bfloat16, len(self.layers))
        self.rounds = any(isinstance(module, Held) and module.inputs is not None for module in model.modules())
        self._done: dict[int, Callable[[int, int, int], None]] = {}
        self._told: dict[int, Told] = {}
        # seconds of each step and who did it, while they are taken
        self._took: dict[tuple[int, str], list[float]] | None = None
        self._buffers: list[Tensor] = []
        self._pages: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self.layers]
        self._rows = self._turned = self._texts = 0
        self._begins = [self._layer(i, layer) for i, layer in enumerate(self.layers)]
        self._ends = self._norm(self.head_norm, STREAM, NORMED, 1)
        self._last = self._product(self._out, NORMED, LOGITS) + 1

    # ---- the tape

    def _layer(self, index: int, layer: Layer) -> int:
        """Writes one layer; -> its first step."""
        (h, k), d = self._heads[index], self._d
        attention: Any = self.model.get_decoder().layers[index].self_attn
        first = self._norm(layer.before, STREAM, NORMED, 1)
        for module, to in ((layer.q, QUERY), (layer.k, KEYS), (layer.v, VALUES)):
            self._product(module, NORMED, to)
        for norm, at, heads in ((layer.q_norm, QUERY, h), (layer.k_norm, KEYS, k)):
            if norm is not None:
                self._norm(norm, at, at, heads)
        for at, heads in ((QUERY, h), (KEYS, k)):
            self._told[self._tape.rope(at, d, heads)] = Told("rotary embedding")
        scale = float(attention.scaling)
        if self._holds:
            step = self._tape.outside()
            self._done[step] = lambda b, t, past: self._mix(index, scale, b, t)
        else:
            self._told[self._tape.append(KEYS, VALUES, d, k, index)] = Told("keys and values put away")
            step = self._tape.attend(QUERY, MIXED, d, h, index, k, scale, MOST)
            self._done[step] = lambda b, t, past: self._attend(index, scale, b, t, past)
        self._told[step] = Told("attention")
        self._product(layer.o, MIXED, OUT)
        hidden = self._hidden
        self._told[self._tape.add(OUT, STREAM, hidden)] = Told("sum")
        self._norm(layer.between, STREAM, NORMED, 1)
        if isinstance(layer.mlp, Routed) and (found := layer.mlp.skips()) is not None and found.gate is not None:
            self._product(found.gate, NORMED, GATE)
            self._skip(layer.mlp, found, GATE, OUT, hidden)
        elif layer.gate is None or layer.up is None:
            step = self._tape.outside()
            self._done[step] = self._outside(layer.mlp, NORMED, OUT, hidden, hidden)
            self._told[step] = Told(type(layer.mlp).__name__, sum(t.numel() * t.element_size() for t in layer.mlp.state_dict().values()))
        else:
            self._product(layer.gate, NORMED, GATE)
            self._product(layer.up, NORMED, UP)
            self._told[self._tape.gate(GATE, UP, _width(layer.up)[0])] = Told("gate")
            self._product(layer.down, UP, OUT)
        self._told[self._tape.add(OUT, STREAM, hidden)] = Told("sum")
        return int(first)

    def _address(self, tensor: Tensor | None) -> int:
        """Where a tensor lies, which is kept from now on."""
        if tensor is None:
            return 0
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _norm(self, module: Any, source: int, to: int, heads: int) -> int:
        times = module.weight.detach().float().contiguous()
        step = int(self._tape.norm(source, to, times.numel(), heads, self._address(times), float(module.variance_epsilon)))
        self._told[step] = Told("norm")
        return step

    def _skip(self, module: nn.Module, found: Skips, source: int, to: int, m: int) -> int:
        """What a Routed part of inputs (b, t, m) leaves out where a token comes alone; -> its step."""
        n, h = found.down.shape
        stored = [one for one in (found.down, found.up) if one is not None]
        if all(one.dtype == stored[0].dtype in (torch.float32, torch.bfloat16) for one in stored):
            places = [self._address(one) for one in (found.least.detach().float(), found.down.detach(), found.up)]
            gates, narrow = found.up is not None, stored[0].dtype == torch.bfloat16
            gated = [NORMED, m, places[2]] if gates else [-1, 0, 0]
            step = self._tape.skip(source, to, h, places[0], found.least.numel(), places[1], narrow, n, *gated, 1)
        else:
            step = self._tape.outside()
        self._told[int(step)] = Told(f"{type(module).__name__} {n} x {h}", sum(one.numel() * one.element_size() for one in stored))
        self._done[int(step)] = self._outside(module, NORMED if found.up is not None else source, to, n, m)
        return int(step)

    def _product(self, module: Any, source: int, to: int) -> int:
        """A product by its native kernel where there is one; -> its step."""
        n, m = _width(module)
        if isinstance(module, Routed) and (found := module.skips()) is not None:
            return self._skip(module, found, source, to, m)
        whole, codes = _matrix(module), module.weight.read() if isinstance(module, Held) else None
        bias = None if module.bias is None else module.bias.detach().float().contiguous()
        if whole is not None and whole.dtype in (torch.float32, torch.bfloat16) and whole.is_contiguous():
            narrow = whole.dtype == torch.bfloat16
            form, nbytes = str(whole.dtype).removeprefix("torch."), whole.numel() * whole.element_size()
            step = self._tape.dense(source, to, self._address(whole), narrow, n, m, self._address(bias), FEW)
        elif whole is None and codes is not None:
            stored = [t if t is None else t.contiguous() for t in (codes.codes, codes.scales, codes.zeros)]
            strides = [0 if t is None else t.shape[1] for t in stored]
            form = f"{codes.bits} bits{f', groups of {codes.group}' if codes.group else ''}{', inputs in 8' if codes.int8 else ''}"
            nbytes = sum(t.numel() * t.element_size() for t in stored if t is not None)
            most = 1 << 40 if codes.int8 else rows_for(self._level, codes.bits, self.dtype, even(codes.group, m), n * m)
            step = self._tape.linear(
                source, to, self._address(stored[0]), strides[0], self._address(stored[1]), self._address(stored[2]), strides[2],
                n, m, codes.bits, codes.group, codes.half, self._address(bias), codes.int8, most,
            )  # fmt: skip
        else:
            form = type(module if isinstance(module, Routed) else module.weight).__name__
            nbytes, step = module.weight.nbytes, self._tape.outside()
        self._told[int(step)] = Told(f"product {n} x {m}, {form}", nbytes)
        self._done[int(step)] = self._outside(module, source, to, n, m)
        return int(step)

    def _outside(self, module: nn.Module, source: int, to: int, n: int, m: int) -> Callable[[int, int, int], None]:
        """What a module (b, t, m) -> (b, t, n) does, between two buffers."""

        def outside(b: int, t: int, past: int) -> None:
            out = module(self._buffers[source][: b * t * m].view(b, t, m).to(self.dtype))
            # experts may give what their router said as well
            self._buffers[to][: b * t * n].view(b, t, n).copy_(out[0] if isinstance(out, tuple) else out)

        return outside

    # ---- a pass

    def _make_room(self, b: int, t: int, past: int) -> None:
        """Buffers for b * t rows, pages and angles for past + t tokens."""
        rows = b * t
        if rows > self._rows:
            self._rows = rows
            hidden = self._hidden
            middle = max((_middle(layer) for layer in self.layers), default=0)
            h, k = (max(counts) * self._d for counts in zip(*self._heads, strict=True))
            wide = [hidden, hidden, h, k, k, h, middle, middle, hidden]
            self._buffers = [*(torch.zeros(rows * width) for width in wide), torch.zeros(0)]
            self._tape.hold([buffer.data_ptr() for buffer in self._buffers])
        if past + t > self._turned:
            self._turned = -(-(past + t) // PAGE) * PAGE
            places = torch.arange(self._turned)[None]
            found = self.model.get_decoder().rotary_emb(torch.zeros(1), places)
            self._angles = [one[0].float().contiguous() for one in found]
            self._tape.turn(*(one.data_ptr() for one in self._angles))
        wanted = 0 if self._holds else -(-(past + t) // PAGE)
        for index, (keys, values) in enumerate(self._pages):
            if len(keys) < wanted:
                for half in (keys, values):
                    shape = b, self._heads[index][1], PAGE, self._d
                    half += [torch.zeros(shape, dtype=self.dtype) for _ in range(wanted - len(half))]
                self._tell(index)

    def _tell(self, index: int) -> None:
        keys, values = self._pages[index]
        self._tape.page(index, [page.data_ptr() for page in keys], [page.data_ptr() for page in values])

    def _attend(self, index: int, scale: float, b: int, t: int, past: int) -> None:
        """Attention of many new tokens, whose keys and values are in their pages."""
        query = self._copied(QUERY, self._heads[index][0], b, t)
        keys, values = (torch.cat(half, 2)[:, :, : past + t] for half in self._pages[index])
        pattern = pattern_of(self.model.get_decoder())
        if pattern is not None and t >= 2 * pattern.block:
            self._put(block_attention(query, keys, values, pattern(query, keys, scale), pattern.block, scale))
            return
        self._put(causal_attention(query, keys, values, scale))

    def _mix(self, index: int, scale: float, b: int, t: int) -> None:
        """Attention over what a State holds."""
        assert self._past is not None
        h, k = self._heads[index]
        query, keys, values = (self._copied(at, heads, b, t) for at, heads in ((QUERY, h), (KEYS, k), (VALUES, k)))
        self._put(self._past.mix(index, query, keys, values, scale))

    def _copied(self, buffer: int, heads: int, b: int, t: int) -> Tensor:
        """What lies in a buffer as (b, heads, t, d), in a copy."""
        return self._buffers[buffer][: b * t * heads * self._d].view(b, t, heads, self._d).transpose(1, 2).to(self.dtype, copy=True)

    def _put(self, mixed: Tensor) -> None:
        """What attention gives (b, heads, t, d)."""
        self._buffers[MIXED][: mixed.numel()].view(mixed.transpose(1, 2).shape).copy_(mixed.transpose(1, 2))

    def _run(self, first: int, last: int, b: int, t: int, past: int) -> None:
        threads = torch.get_num_threads()
        if self._took is not None:
            for step in range(first, last):
                began, by = time.perf_counter(), "native"
                if self._tape.run(step, step + 1, b, t, past, threads) == step:
                    self._done[step](b, t, past)
                    by = "torch"
                self._took.setdefault((step, by), []).append(time.perf_counter() - began)
            return
        while (first := self._tape.run(first, last, b, t, past, threads)) < last:
            self._done[first](b, t, past)
            first += 1

    def _through(self, tokens: Tensor, hidden: Tensor | None, first: int, last: int) -> Tensor:
        """Layers first to last - 1 over the next tokens (b, t); -> the stream (b, t, d), which the next pass writes over."""
        b, t = tokens.shape
        past = self.length + self._waiting.get(first, 0)
        if past and self._texts != b:
            raise UserError(f"{b} texts go on from {self._texts}; give as many tokens as there are texts")
        if b != self._texts:
            self._texts, self._pages = b, [([], []) for _ in self.layers]
        self._make_room(b, t, past)
        width = self._hidden
        stream = self._buffers[STREAM][: b * t * width].view(b, t, width)
        stream.copy_(self._table(tokens) if hidden is None else hidden)
        for index in range(first, last):
            self._waiting[index] = self._waiting.get(index, 0) + t
        self.layer_passes += last - first
        self._run(self._begins[first], self._begins[last] if last < len(self.layers) else self._ends, b, t, past)
        return stream

    def spent(self, tokens: Tensor, new: int) -> dict[str, list[Spent]]:
        """Where the time of a prompt (b, t), and of each of `new` tokens after it, goes; the longest first."""
        found: dict[str, list[Spent]] = {}
        step, passes = tokens, {"prefill": 1, "decode": new}
        for phase, times in passes.items():
            self._took = {}
            for _ in range(times):
                step = self.answer(step, keep=1).logits.argmax(-1)
                self.settle(tokens.shape[1] if phase == "prefill" else 1)
            sums: dict[tuple[str, str], list[float]] = {}
            for (number, by), seconds in self._took.items():
                told = self._told[number]
                one = sums.setdefault((told.what, by), [0, 0.0, 0])
                one[0] += 1
                one[1] += 1e3 * sum(seconds) / times
                one[2] += told.nbytes * len(seconds) // times
            self._took = None
            rows = [Spent(what, by, int(count), ms, int(nbytes)) for (what, by), (count, ms, nbytes) in sums.items()]
            found[phase] = sorted(rows, key=lambda row: -row.ms)
        return found

    # ---- what a Stack does

    def rise(self, tokens: Tensor, last: int) -> Tensor:
        if not 0 < last < len(self.layers):
            raise ValueError(f"rise ends before one of the layers, 1 to {len(self.layers) - 1}, not {last}")
        return self._through(tokens, None, 0, last).to(self.dtype, copy=True)

    def answer(self, tokens: Tensor, hidden: Tensor | None = None, first: int = 0, keep: int | None = None) -> Answer:
        if keep is not None and hidden is None and not self._holds:
            # a long prompt is read in pieces, so that what is computed for it stays small
            while tokens.shape[1] > max(PROMPT, keep):
                self._through(tokens[:, :PROMPT], None, first, len(self.layers))
                tokens = tokens[:, PROMPT:]
        stream = self._through(tokens, hidden, first, len(self.layers))
        b, t = tokens.shape
        if keep is not None and keep < t:
            kept = stream[:, t - keep :].clone()
            t = keep
            self._buffers[STREAM][: kept.numel()].copy_(kept.flatten())
        vocabulary = _width(self._out)[0]
        if self._buffers[LOGITS].numel() < b * t * vocabulary:
            self._buffers[LOGITS] = torch.zeros(b * t * vocabulary)
            self._tape.hold([buffer.data_ptr() for buffer in self._buffers])
        self._run(self._ends, self._last, b, t, 0)
        read = self._buffers[NORMED][: b * t * stream.shape[2]].view(b, t, -1)
        found = self._buffers[LOGITS][: b * t * vocabulary].view(b, t, -1)
        return Answer(found.to(self.dtype, copy=True), read.to(self.dtype, copy=True))

    def head(self, hidden: Tensor) -> Tensor:
        return self._out(hidden)  # type: ignore[no-any-return]

    def mix(self, part: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.part_passes += 1
        if self._past is None:
            raise ValueError("parts beside the model attend over a State of their own; give one")
        return self._past.mix(len(self.layers) + part, query, keys, values)

    def settle(self, count: int) -> None:
        if self._past is not None:
            self._past.settle(count)
        self.length += count
        self._waiting = {}

    def fork(self, index: Tensor) -> None:
        if self._waiting:
            raise ValueError("rows are picked once pending tokens are settled")
        if self._past is not None:
            self._past.fork(index)
        self._texts = len(index)
        for layer, halves in enumerate(self._pages):
            for half in halves:
                half[:] = [page[index] for page in half]
            self._tell(layer)


def steps_of(model: nn.Module) -> Steps | str:
    """The model as Steps, where these give its own logits over a few tokens, read together and one after them; else why not."""
    whole = cast(Any, model)
    # with nothing left out: a threshold is a step, and a sum in another order may fall on the other side of it
    with torch.inference_mode(), asking([part for part in model.modules() if isinstance(part, Routed)], "gathered", "all"):
        try:
            steps = Steps(model)
        except (UserError, ValueError) as error:
            return str(error)
        tokens = torch.arange(1, TRIAL + 1)[None] * 7 % whole.config.vocab_size
        wanted = whole(input_ids=tokens, use_cache=False).logits.float()
        found = []
        for part in (tokens[:, :-1], tokens[:, -1:]):
            found.append(steps.answer(part).logits.float())
            steps.settle(part.shape[1])
        apart = float((torch.cat(found, 1) - wanted).abs().max() / wanted.abs().max())
    if not apart <= max(NEAR[steps.dtype], ROUNDED if steps.rounds else 0.0):
        return f"its logits on a trial were {apart:.1e} from the model's own"
    return Steps(model)
