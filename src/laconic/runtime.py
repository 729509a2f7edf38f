"""Runs a State inside transformers: a Cache whose full-attention layers are held by a State, for `generate` and for plain forward passes.

transformers hands keys and values to a cache without the padding mask, and a padding token in a group of tokens would stretch its scale. So
a hook on the decoder, once put there and inert for other caches, shows each forward pass's `attention_mask` to the cache, which holds real
tokens only and puts them back into the columns that the model's own mask speaks of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from laconic.core.errors import UserError
from laconic.core.state import Ragged, State


def own_layers(model: nn.Module) -> list[Any]:
    """The layers of the cache that transformers would make for a decoder; UserError for any other module."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UserError(f"{type(model).__name__} is no model of transformers; give what AutoModelForCausalLM.from_pretrained returns")
    if config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} has an encoder and a decoder; caches of decoders only are supported")
    return DynamicCache(config=config.get_text_config(decoder=True)).layers


class StateLayer(CacheLayerMixin):
    """One full-attention layer: nothing but its place in the cache's State and how many columns it has."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: StateCache, index: int) -> None:
        CacheLayerMixin.__init__(self)
        self.cache, self.index, self.columns = cache, index, 0
        # set by transformers where tokens may be taken back: then they stay staged until the next forward pass
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def activate_past_recording(self) -> None:
        """From now on a forward pass's tokens can be taken back by `crop`."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values (b, h, t, d) -> all that attention may read, padding columns included."""
        self.is_initialized = True
        if not key_states.shape[-1]:
            # of an attention that was taken out: tokens went by, and nothing of them is held
            self.columns += key_states.shape[2]
            return key_states, value_states
        cache, state, first = self.cache, self.cache.state, self.columns == 0
        cache.settle(self.index)
        mask, positions = cache.look(self.columns, key_states)
        seen = state.append(self.index, (key_states, value_states), positions, mask)
        self.columns += key_states.shape[2]
        if not self.record_past:
            state.commit(torch.tensor(state.waiting(self.index)), self.index)
        if first:
            return key_states, value_states
        return cache.spread(seen[0], self.columns), cache.spread(seen[1], self.columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1


class StateCache(Cache):
    """A transformers Cache over a State. Layers of other kinds (sliding windows, state spaces) stay in transformers' own form.

    state: what is held now; nbytes: bytes of all layers. real: which columns (b, t) hold tokens, None while all do."""

    def __init__(self, model: nn.Module, state: State) -> None:
        layers = own_layers(model)
        self.mine = {i: StateLayer(self, i) for i, layer in enumerate(layers) if type(layer) is DynamicLayer}
        self.others = [layer for i, layer in enumerate(layers) if i not in self.mine]
        if not self.mine:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise UserError(f"no layer of this model attends to all past tokens (its caches are {kinds}); there is nothing to hold")
        Cache.__init__(self, layers=[self.mine.get(i, layer) for i, layer in enumerate(layers)])
        self.state = state
        self.real: Tensor | None = None
        self.shown: Tensor | None = None
        decoder = model.get_decoder()  # type: ignore[operator]
        if show not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(show, with_kwargs=True)

    @property
    def nbytes(self) -> int:
        """Bytes held: of the State, and of keys and values of layers that it does not hold."""
        others = (getattr(layer, name, None) for layer in self.others for name in ("keys", "values"))
        return self.state.nbytes + sum(t.numel() * t.element_size() for t in others if t is not None)

    def settle(self, index: int | None = None) -> None:
        """Commits what an earlier forward pass left staged: called by a layer that begins a new one, or for all."""
        if index is None or any(self.state.waiting(index)):
            for i in self.mine:
                if any(waiting := self.state.waiting(i)):
                    self.state.commit(torch.tensor(waiting), i)

    def look(self, past: int, new: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which of the new columns are tokens (None: all), and the place of each in its row."""
        b, t = new.shape[0], new.shape[2]
        shown = self.shown
        if shown is not None and tuple(shown.shape) == (b, past + t) and (self.real is None or self.real.shape[1] < past + t):
            known = self.real if self.real is not None else shown.new_ones(b, past)
            self.real = torch.cat([known, shown[:, past:]], 1)
        elif self.real is not None and self.real.shape[1] < past + t:
            self.real = torch.cat([self.real, self.real.new_ones(b, past + t - self.real.shape[1])], 1)
        if self.real is None:
            return None, torch.arange(past, past + t, device=new.device).expand(b, t)
        real = self.real[:, : past + t].to(new.device)
        fresh = real[:, past:]
        return fresh, (real.cumsum(1) - 1).clamp(min=0)[:, past:]

    def spread(self, rows: Ragged, columns: int) -> Tensor:
        """Tokens of rows -> (b, h, columns, d); a padding column repeats some token, the model's mask leaves it out."""
        if self.real is None:
            return rows.data
        at = (self.real[:, :columns].cumsum(1) - 1).clamp(min=0).to(rows.data.device)
        return rows.data.gather(2, at[:, None, :, None].expand(-1, rows.data.shape[1], -1, rows.data.shape[3]))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove columns, which leave no trace: of the last forward pass, and after
        `activate_past_recording` only."""
        gone = -tokens_to_remove
        first = min(self.state.layers.keys() & self.mine.keys(), default=min(self.mine))
        columns = self.mine[first].columns
        if gone:
            real = torch.ones(1, columns) if self.real is None else self.real[:, :columns]
            lost = [int(n) for n in real[:, columns - gone :].sum(1).tolist()]
            waiting = self.state.waiting(first)
            stay = [n - lost[row % len(lost)] for row, n in enumerate(waiting)]
            if gone < 0 or not stay or min(stay) < 0:
                raise UserError(
                    f"cannot crop by {tokens_to_remove}: a cache that compresses takes back only what its last forward pass appended, "
                    f"here {max(waiting, default=0)} tokens, and only after activate_past_recording(); give a negative number within these"
                )
            self.state.commit(torch.tensor(stay))
        for layer in self.mine.values():
            layer.columns -= gone
        for other in self.others:
            other.crop(tokens_to_remove)
        if self.real is not None:
            self.real = self.real[:, : columns - gone]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, for beam search: a fork of the State."""
        self.state = self.state.fork(beam_idx)
        self.real = None if self.real is None else self.real[beam_idx.to(self.real.device)]
        for other in self.others:
            other.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As reorder_cache, with as many rows as are named."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        had = next(iter(self.state.layers.values()), None)
        rows = 0 if had is None else len(had.count)
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty again."""
        self.state = replace(self.state)
        self.real = self.shown = None
        for layer in self.mine.values():
            layer.columns, layer.record_past = 0, False
        for other in self.others:
            other.reset()


def show(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook before a decoder's forward pass: its padding mask, for a StateCache."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given.get("kwargs", {}), **given}
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if isinstance(cache, StateCache):
        # masks of other shapes say more than which tokens are padding, and are left to the model
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
        cache.shown = mask.bool() if isinstance(mask, Tensor) and padded else None
