"""Runs a State inside transformers: a Cache whose full-attention layers are held by a State, for `generate` and for plain forward passes.

transformers hands keys and values to a cache without the padding mask, and a padding token in a group of tokens would stretch its scale. So
a hook on the decoder, once put there and inert for other caches, shows each forward pass's `attention_mask` to the cache, which holds real
tokens only and puts them back into the columns that the model's own mask speaks of.

Tokens that are generated attend over what is held (`State.attend`): for the time of a forward pass the hook exchanges the implementation of
attention `sdpa` for `laconic`, which is the same but for what a cache has marked as its own. A layer whose attention took what the cache
gave as it was, with nothing besides a scale, is not handed dense tensors again; a pass that is not like that reads them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from laconic.architectures import DECODERS, Decoder, rotary_pairs
from laconic.core.errors import UserError
from laconic.core.packed import Packed
from laconic.core.state import Pattern, Ragged, State
from laconic.kernels.attention import ELSEWHERE, MOST, read_as_held
from laconic.kernels.gpu import block_attention
from laconic.kernels.memory import trim
from laconic.kernels.native import native
from laconic.kernels.place import on

OURS, THEIRS = "laconic", "sdpa"
# tokens that a model is shown where keys are to be seen and no text is there
DRAWN = 2048
# tokens after which freed memory is given back at the earliest
OFTEN = 512
# what attention is told besides, and what changes nothing of what it computes
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "logits_to_keep"}


def own_layers(model: nn.Module) -> list[Any]:
    """The layers of the cache that transformers would make for a decoder; UserError for any other module."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UserError(f"{type(model).__name__} is no model of transformers; give what AutoModelForCausalLM.from_pretrained returns")
    if config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} has an encoder and a decoder; caches of decoders only are supported")
    return DynamicCache(config=config.get_text_config(decoder=True)).layers


def key_loudness(model: nn.Module) -> Iterator[Tensor | None]:
    """Of each layer how large the entries of each channel of its keys are by the weights, (k, d): the norm of what makes a channel, times
    the scale of a norm of keys; the two channels of a rotary pair, which positions mix, share the root of their mean square. None where
    the architecture has no row of data, and for a layer without such a projection."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    row, there = DECODERS.get(config.model_type), dict(model.named_modules())
    for layer in range(config.num_hidden_layers):
        part = next((one for one in ("k", "qkv") if row is not None and one in row.parts), None)
        weight: Any = None if row is None or part is None else getattr(there.get(f"{row.blocks}.{layer}.{row.parts[part]}"), "weight", None)
        if row is None or part is None or not isinstance(weight, Packed | Tensor):
            yield None
            continue
        dense = (weight.dense() if isinstance(weight, Packed) else weight.detach()).float()
        loud = _keys_of(dense.norm(dim=0 if row.transposed else 1), part, row, config)
        gain: Any = getattr(there.get(f"{row.blocks}.{layer}.{row.norms.get('k', '')}"), "weight", None) if "k" in row.norms else None
        if gain is not None and gain.numel() == loud.shape[1]:
            loud = loud / loud.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) * (gain.detach().float() + row.plus).abs()
        half = rotary_pairs(config, loud.shape[1])
        pairs = loud[:, : 2 * half].unflatten(1, (2, half))
        yield torch.cat([pairs.square().mean(1, keepdim=True).sqrt().expand_as(pairs).flatten(1), loud[:, 2 * half :]], 1)


def key_peaks(model: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor, int] | None]:
    """Of each layer the largest size of each channel of its keys as positions have turned them, (k, d), over rows of tokens (b, t), and
    how many pairs of channels they turn; None for a layer that does not attend to all past tokens. Without rows, over tokens drawn from
    the vocabulary, as many as the context has but 2,048 at most."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    cache = DynamicCache(config=config)
    if rows is None:
        longest = min(int(getattr(config, "max_position_embeddings", DRAWN)), DRAWN)
        rows = torch.randint(0, config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    device = next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.inference_mode():
        model.get_decoder()(rows.to(device), past_key_values=cache, use_cache=True)  # type: ignore[operator]
    for layer in cache.layers:
        keys = layer.keys if type(layer) is DynamicLayer and layer.keys is not None else None
        if keys is None or not keys.shape[-1]:
            yield None
            continue
        yield keys.float().abs().amax((0, 2)).clone(), rotary_pairs(config, keys.shape[-1])


def fitted(state: State, model: nn.Module) -> State:
    """A state, empty, for one model."""
    return state.fitted(key_loudness(model), partial(key_peaks, model))


def _keys_of(found: Tensor, part: str, row: Decoder, config: Any) -> Tensor:
    """Of a number for each output of the projection that makes keys, those of keys, head by head, (k, d)."""
    d = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    heads = found.reshape(-1, d)
    if part == "k":
        return heads
    if row.by_head:
        return heads[1::3]
    served = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    k = len(heads) // (served + 2)
    return heads[served * k : (served + 1) * k]


class Reading(NamedTuple):
    """What a layer of the cache marks its keys with on their way to attention: whose they are, the values beside them, and whether they
    are new tokens only, the rest to be read where it is held."""

    layer: StateLayer
    values: Tensor
    held: bool


class StateLayer(CacheLayerMixin):
    """One full-attention layer: nothing but its place in the cache's State and how many columns it has."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: StateCache, index: int) -> None:
        CacheLayerMixin.__init__(self)
        self.cache, self.index, self.columns = cache, index, 0
        # whether attention was seen to take keys and values as they come, and nothing else
        self.direct = False
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
        direct = cache.ours and self.direct and not first and key_states.shape[2] <= MOST and (mask is None or bool(mask.all()))
        state.stage(self.index, (key_states, value_states), positions, mask)
        self.columns += key_states.shape[2]
        cache.tidy(self.columns)
        if not direct:
            keys, values = (key_states, value_states) if first else self.dense()
            self.settle()
        else:
            keys, values = key_states, value_states
        if cache.ours:
            # a view, so that the mark stays with what this pass hands on
            keys = keys.view_as(keys)
            keys.reading = Reading(self, values, direct)  # type: ignore[attr-defined]
        return keys, values

    def dense(self) -> tuple[Tensor, Tensor]:
        """All that attention may read, padding columns included."""
        keys, values = self.cache.state.seen(self.index)
        return self.cache.spread(keys, self.columns), self.cache.spread(values, self.columns)

    def settle(self) -> None:
        """Commits what was staged, unless it may be taken back."""
        if not self.record_past:
            self.cache.state.commit(torch.tensor(self.cache.state.waiting(self.index)), self.index)

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
        self.state = fitted(state, model)
        self.real: Tensor | None = None
        self.shown: Tensor | None = None
        # the mask that was last compared, and whether it says only what the cache knows
        self.judged: tuple[Tensor, bool] | None = None
        # whether the forward pass under way attends by `attend`
        self.ours = False
        # tokens that were held when freed memory was last given back
        self.tidied = 0
        hook(model.get_decoder())  # type: ignore[operator]

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

    def tidy(self, columns: int) -> None:
        """Gives freed memory back once enough has come: pages stay, and what attention makes of them goes, larger each time."""
        if columns >= self.tidied + OFTEN:
            self.tidied = columns
            trim()

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

    def plain(self, mask: Tensor | None, t: int) -> bool:
        """Whether a mask (b, 1, t, columns) of the last t columns forbids later ones and padding and no more."""
        if mask is None:
            return t == 1 and self.real is None
        if self.judged is None or self.judged[0] is not mask:
            columns = mask.shape[-1]
            known = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, t)
            if known:
                wanted = torch.ones(t, columns, dtype=torch.bool, device=mask.device).tril(columns - t)
                if self.real is not None:
                    wanted = wanted & self.real[:, None, :columns].to(mask.device)
                known = torch.equal(mask[:, 0], wanted.expand(mask.shape[0], t, columns))
            self.judged = mask, known
        return self.judged[1]

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


def _cache(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[StateCache | None, Any]:
    """The cache that a forward pass was given, if it is ours, and its padding mask."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given.get("kwargs", {}), **given}
    cache = given.get("past_key_values")
    return (cache if isinstance(cache, StateCache) else None), given.get("attention_mask")


def show(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook before a decoder's forward pass: its padding mask, for a StateCache, and attention over what that holds."""
    config: Any = module.config
    cache, mask = _cache(module, args, kwargs)
    ours = config._attn_implementation == THEIRS and not torch.compiler.is_compiling()
    if cache is not None:
        # masks of other shapes say more than which tokens are padding, and are left to the model
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
        cache.shown = mask.bool() if isinstance(mask, Tensor) and padded else None
        cache.ours = ours and (native() is not None or bool(ELSEWHERE))
    if ours and ((cache is not None and cache.ours) or pattern_of(module) is not None):
        config._attn_implementation = OURS


def hide(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    """The hook after it: all as it was."""
    config: Any = module.config
    cache, _ = _cache(module, args, kwargs)
    if config._attn_implementation == OURS:
        config._attn_implementation = THEIRS
    if cache is not None:
        cache.ours, cache.judged = False, None


def hook(decoder: nn.Module) -> None:
    """Puts both in their places, once."""
    if show not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(show, with_kwargs=True)
        decoder.register_forward_hook(hide, with_kwargs=True, always_call=True)


def pattern_of(module: nn.Module) -> Pattern | None:
    """What a decoder, or one of its layers of attention, was told of prompts."""
    found: Pattern | None = getattr(module, "pattern", None)
    return found


def attend_by(model: nn.Module, pattern: Pattern | None) -> None:
    """From now on prompts of a decoder attend by a pattern, or as before; UserError for a model without full attention over its past."""
    if not any(type(layer) is DynamicLayer for layer in own_layers(model)):
        raise UserError("no layer of this model attends to all past tokens; there is no prompt to attend to by blocks")
    decoder = model.get_decoder()  # type: ignore[operator]
    hook(decoder)
    for module in (decoder, *(module for module in decoder.modules() if hasattr(module, "layer_idx"))):
        module.pattern = pattern


def _by_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: set[str], scale: float | None
) -> Tensor | None:
    """Attention of a prompt (b, h, t, d) by its layer's pattern; None where there is none, or the mask says more than causality."""
    pattern = pattern_of(module)
    t, s = query.shape[2], key.shape[2]
    if pattern is None or asked or t < 2 * pattern.block or getattr(module, "sliding_window", None):
        return None
    if mask is None:
        causal = getattr(module, "is_causal", True) and t == s
    else:
        wanted = torch.ones(t, s, dtype=torch.bool, device=mask.device).tril(s - t)
        causal = mask.dtype == torch.bool and mask.shape[-2:] == (t, s) and torch.equal(mask, wanted.expand(mask.shape))
    if not causal:
        return None
    with on(query.device):
        kept = pattern(query, key, scale)
    return block_attention(query, key, value, kept, pattern.block, scale)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, but for new tokens of a layer that is held elsewhere: attention over what its State holds; and for prompts of a
    model that attends by a Pattern."""
    reading: Reading | None = getattr(key, "reading", None)
    asked = {name for name, told in kwargs.items() if told is not None and told is not False} - HARMLESS
    if reading is not None:
        layer, cache = reading.layer, reading.layer.cache
        plain = value is reading.values and not dropout and not asked and is_causal is not False
        layer.direct = plain and read_as_held(key.device)
        if reading.held:
            if plain and cache.plain(attention_mask, query.shape[2]):
                out = cache.state.attend(query, layer.index, None, scaling)
                layer.settle()
                return out.transpose(1, 2).contiguous(), None
            key, value = layer.dense()
            layer.settle()
    if (
        not dropout
        and is_causal is not False
        and (done := _by_blocks(module, query, key, value, attention_mask, asked, scaling)) is not None
    ):
        return done.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)


AttentionInterface.register(OURS, attend)
AttentionMaskInterface.register(OURS, sdpa_mask)
