"""Runs a Decoder on a decoder of transformers: a Stack over its layers, whose keys and values a State holds.

A pass over a part of the layers is a forward pass of the model itself, so that masks, positions, scales and caps are its own: layers before
the part give on the hidden states that they are handed, and the first layer behind it ends the pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from laconic.core.decoder import Answer, Body, Stack
from laconic.core.errors import UserError
from laconic.core.state import State
from laconic.runtime import fitted, own_layers


class Left(Exception):
    """A pass that ends early, with the hidden states it ends with."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class PendingLayer(CacheLayerMixin):
    """One layer's place in a Pending cache."""

    supports_early_init = False

    def __init__(self, cache: Pending, index: int) -> None:
        CacheLayerMixin.__init__(self)
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values (b, h, t, d) -> all that attention may read."""
        self.is_initialized = True
        return self.cache.take(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.at + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.at

    def get_max_length(self) -> int:
        return -1


class Pending(Cache):
    """A transformers Cache over a State whose new tokens may be taken back, as many of them in each layer as that layer has run.

    Where a State is steady, tokens stay staged until they are settled. Where it is not (a quantized one), what a token reads depends on
    how many before it were committed: so each is committed before the next is read, as in decoding one by one, and a mark brings back
    what was there before. `apart`: the tokens of one row come as rows of a batch, since each has keys and values of its own to read."""

    def __init__(self, depth: int, state: State) -> None:
        Cache.__init__(self, layers=[PendingLayer(self, i) for i in range(depth)])
        self.state, self.apart = state, False
        self.length = self.at = 0
        self.waiting: dict[int, int] = {}
        self.fresh: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.mark = state.mark()

    def put(self, index: int, keys: Tensor, values: Tensor) -> None:
        """The next tokens (b, h, t, d) of a layer into the State, staged."""
        self.waiting[index] = self.waiting.get(index, 0) + keys.shape[2]
        self.state.stage(index, (keys, values), None, None)
        if self.length and not self.state.steady:
            self.fresh.setdefault(index, []).append((keys, values))

    def keep(self, index: int) -> None:
        """Commits what is staged, where it need not be. The first tokens of all read each other as they are and are not taken back: each
        layer commits at once, as a prefill does."""
        if not self.length or not self.state.steady:
            self.state.commit(torch.tensor(self.state.waiting(index)), index)

    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (b, h, t, d) of a layer into the State -> what they read; of a State that is not steady one at a time."""
        self.put(index, keys, values)
        seen = self.state.seen(index)
        self.keep(index)
        return seen[0].data, seen[1].data

    def take(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer of the model does with new keys and values."""
        if not self.apart:
            return self.append(index, keys, values)
        read = [self.append(index, keys[j : j + 1], values[j : j + 1]) for j in range(keys.shape[0])]
        longest = read[-1][0].shape[2]
        return tuple(torch.cat([F.pad(one[half], (0, 0, 0, longest - one[half].shape[2])) for one in read]) for half in (0, 1))  # type: ignore[return-value]

    def mix(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the next tokens of a layer, each (b, heads, t, d), over all that it has seen and themselves."""
        if not self.length and index not in self.waiting:
            self.put(index, keys, values)
            self.keep(index)
            shared = query.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=shared)
        if self.state.steady:
            self.put(index, keys, values)
            return self.state.attend(query, index, None, scale)
        out = []
        for one in range(query.shape[2]):
            at = slice(one, one + 1)
            self.put(index, keys[:, :, at], values[:, :, at])
            out.append(self.state.attend(query[:, :, at], index, None, scale))
            self.keep(index)
        return torch.cat(out, 2)

    def fork(self, index: Tensor) -> None:
        """Rows by index; nothing may be pending."""
        if self.waiting:
            raise ValueError("rows are picked once pending tokens are settled")
        self.state = self.state.fork(index)
        self.mark = self.state.mark()

    def settle(self, count: int) -> None:
        """The first `count` pending tokens stay."""
        stay = {index: min(count, n) for index, n in self.waiting.items()}
        if not self.length:
            if stay != self.waiting:
                raise ValueError("the first tokens of all cannot be taken back")
        elif self.state.steady:
            for index, n in stay.items():
                self.state.commit(torch.tensor([n] * len(self.state.layers[index].count)), index)
        elif stay != self.waiting:
            self.state.restore(self.mark)
            for index, n in stay.items():
                keys, values = (torch.cat(halves, 2)[:, :, :n] for halves in zip(*self.fresh[index], strict=True))
                if n:
                    self.state.append(index, (keys, values), None, None)
                    self.state.commit(torch.tensor([n] * len(self.state.layers[index].count)), index)
        self.length += count
        self.waiting, self.fresh, self.mark = {}, {}, self.state.mark()


class Layers(Stack):
    """A decoder of transformers with full attention in every layer. state: empty; parts: placed modules by path."""

    def __init__(self, model: nn.Module, state: State, parts: Mapping[str, nn.Module] | None = None) -> None:
        kinds = {type(layer) for layer in own_layers(model)}
        self.model = whole = cast(Any, model)
        decoder: Any = whole.get_decoder()
        depth = body_of(whole.config).depth
        found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if kinds != {DynamicLayer} or not found:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UserError(
                f"{type(model).__name__} cannot be decoded layer by layer (its caches are {names}, every layer must attend to all past "
                "tokens); generate without a decoder"
            )
        self.decoder, self.layers = decoder, list(found[0])
        self.parts = dict(parts or {})
        self.cache = Pending(depth, fitted(state, model))
        self.layer_passes = self.part_passes = 0
        self._tuples: bool | None = None
        self._keeps = "logits_to_keep" in inspect.signature(whole.forward).parameters

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length

    def rise(self, tokens: Tensor, last: int) -> Tensor:
        if not 0 < last < len(self.layers):
            raise ValueError(f"rise ends before one of the layers, 1 to {len(self.layers) - 1}, not {last}")
        try:
            self._run(self.decoder, tokens, None, 0, last)
        except Left as left:
            return left.hidden
        raise RuntimeError("the model's forward pass never came to its layers")

    def answer(self, tokens: Tensor, hidden: Tensor | None = None, first: int = 0, keep: int | None = None) -> Answer:
        read: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            logits = self._run(self.model, tokens, hidden, first, len(self.layers), keep or 0).logits
        finally:
            hook.remove()
        last = slice(-(keep or 0), None)
        if logits.shape[0] != tokens.shape[0]:
            return Answer(logits.transpose(0, 1)[:, last], read[0].transpose(0, 1)[:, last])
        return Answer(logits[:, last], read[0][:, last])

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def mix(self, part: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.part_passes += 1
        return self.cache.mix(len(self.layers) + part, query, keys, values)

    def settle(self, count: int) -> None:
        self.cache.settle(count)

    def fork(self, index: Tensor) -> None:
        self.cache.fork(index)

    def _run(self, module: Any, tokens: Tensor, hidden: Tensor | None, first: int, last: int, keep: int = 0) -> Any:
        cache = self.cache
        b, t = tokens.shape
        cache.at = cache.length + cache.waiting.get(first, 0)
        places = torch.arange(cache.at, cache.at + t, device=tokens.device)[None]
        given: dict[str, Any] = {"input_ids": tokens, "position_ids": places.expand(b, t)}
        cache.apart = t > 1 and cache.length > 0 and not cache.state.steady
        if cache.apart:
            if b != 1:
                raise UserError(f"{type(cache.state).__name__} takes tokens of one text at a time back, here are {b} texts; give one")
            dtype = self.model.dtype
            beyond = torch.arange(cache.at + t, device=tokens.device) > places.T
            mask = torch.zeros(beyond.shape, dtype=dtype, device=tokens.device).masked_fill(beyond, torch.finfo(dtype).min)
            given = {"input_ids": tokens.T, "position_ids": places.T, "attention_mask": mask[:, None, None]}
            hidden = None if hidden is None else hidden.transpose(0, 1)
        if keep and not cache.apart and self._keeps:
            given["logits_to_keep"] = keep
        self.layer_passes += last - first
        with self._only(hidden, first, last):
            return module(**given, past_key_values=cache, use_cache=True)

    @contextmanager
    def _only(self, hidden: Tensor | None, first: int, last: int) -> Iterator[None]:
        """Inside, layers before `first` give `hidden` on, and the layer `last` ends the pass."""

        def over(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        def leave(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise Left(x if x.shape[0] == 1 or not self.cache.apart else x.transpose(0, 1))

        def look(module: nn.Module, args: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        hook = self.layers[0].register_forward_hook(look) if self._tuples is None else None
        other = {**dict.fromkeys(self.layers[:first], over), **dict.fromkeys(self.layers[last : last + 1], leave)}
        for layer, forward in other.items():
            layer.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for layer in other:
                del layer.forward
            if hook is not None:
                hook.remove()


def body_of(config: Any) -> Body:
    """The measures of a language model, from its config."""
    text = config.get_text_config(decoder=True)
    return Body(int(text.num_hidden_layers), int(text.hidden_size), int(text.num_attention_heads))
