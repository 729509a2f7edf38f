"""The laws of Decoder, run over every one that is found in the tree, over every State: the same tokens as one by one, no layer sees a token
twice, what was taken back leaves no trace, and its parts say in decoding what they said in learning."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from laconic.core.decoder import Decoder, Draw
from laconic.decoding import Layers, body_of
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

DECODERS = [(path, found.instance(cls)) for path, cls in found.classes(Decoder)]
LOSSLESS = [(path, decoder) for path, decoder in DECODERS if decoder.lossless]
each = pytest.mark.parametrize("decoder", [decoder for _, decoder in LOSSLESS], ids=[path for path, _ in LOSSLESS])
STATES = {"full": Full, "kivi": functools.partial(Kivi, group=8, residual=16)}


@functools.lru_cache(maxsize=1)
def model():
    """In fp64, where a tie is a tie. Wide steps between layers, so that drafts are right now and then."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, initializer_range=0.25, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def parts_of(decoder):
    placed = decoder.place(body_of(model().config), torch.Generator().manual_seed(0)).place
    return {path: part.double().requires_grad_(False) for path, part in placed.items()}


def run(decoder, state, prompt, limit, *, draw=None, parts=None, ends=frozenset()):
    stack = Layers(model(), state, parts_of(decoder) if parts is None else parts)
    with torch.inference_mode():
        rounds = list(decoder(stack, prompt, limit=limit, draw=draw or Draw(), ends=ends))
    return torch.cat([one.tokens for one in rounds], 1), rounds, stack


def one_by_one(make, prompt, limit):
    """Tokens by passes through the whole model, and the State at the end."""
    stack, step, chosen = Layers(model(), make()), prompt, []
    with torch.inference_mode():
        for _ in range(limit):
            step_logits = stack.answer(step).logits[:, -1]
            stack.settle(step.shape[1])
            step = step_logits.argmax(-1, keepdim=True)
            chosen.append(step)
    return torch.cat(chosen, 1), stack.cache.state


def prompt(seed=0, t=20):
    return torch.randint(0, 13, (1, t), generator=torch.Generator().manual_seed(seed))


def test_every_decoder_is_found():
    assert {"decode.sample.ancestral", "decode.draft.kangaroo"} <= {path for path, _ in DECODERS}


@each
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_greedy_tokens_are_those_of_one_by_one_and_nothing_else_is_left(decoder, make):
    for seed in range(2):
        expected, state = one_by_one(make, prompt(seed), 30)
        tokens, rounds, stack = run(decoder, make(), prompt(seed), 30)
        assert torch.equal(tokens, expected)
        assert sum(one.tokens.shape[1] for one in rounds) == 30
        assert all(0 <= one.accepted <= one.drafted for one in rounds)
        # what the model's layers hold is what they hold one by one, though some of it was taken back in between
        held = stack.cache.state
        for i in range(3):
            assert held.layers[i].count == state.layers[i].count
            assert not any(held.waiting(i))
            for ours, plain in zip(held.seen(i), state.seen(i), strict=True):
                torch.testing.assert_close(ours.data, plain.data, rtol=1e-9, atol=1e-9)


def test_the_full_cache_is_transformers_own():
    mask = torch.ones(1, 20, dtype=torch.long)
    expected = model().generate(prompt(), attention_mask=mask, do_sample=False, max_new_tokens=30, pad_token_id=0)[:, 20:]
    assert torch.equal(one_by_one(Full, prompt(), 30)[0], expected)


@each
def test_no_layer_sees_a_token_twice(decoder):
    seen = Counter()

    def count(number, module, args, kwargs):
        seen[number] += kwargs["hidden_states"].shape[1]

    hooks = [
        layer.self_attn.register_forward_pre_hook(functools.partial(count, i), with_kwargs=True)
        for i, layer in enumerate(model().model.layers)
    ]
    try:
        _, rounds, _ = run(decoder, Full(), prompt(), 25)
    finally:
        for hook in hooks:
            hook.remove()
    # the prompt, then in each pass the last token and what was drafted behind it
    assert set(seen.values()) == {20 + sum(one.drafted + 1 for one in rounds[1:])}
    assert set(seen) == {0, 1, 2}


@each
def test_nothing_follows_an_end(decoder):
    whole, _, _ = run(decoder, Full(), prompt(), 30)
    end = int(whole[0, 11])
    first = whole[0].tolist().index(end)
    cut, _, _ = run(decoder, Full(), prompt(), 30, ends=frozenset({end}))
    assert cut.tolist() == whole[:, : first + 1].tolist()
    for limit in (1, 2, 3):
        assert run(decoder, Full(), prompt(), limit)[0].tolist() == whole[:, :limit].tolist()


@each
def test_the_same_seed_draws_the_same(decoder):
    drawn = [run(decoder, Full(), prompt(), 20, draw=Draw(1.0, torch.Generator().manual_seed(s)))[0] for s in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("path", "decoder"), [pair for pair in DECODERS if pair[1].lesson is not None])
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_parts_say_in_decoding_what_they_say_in_learning(path, decoder, make):
    """Over a whole text at once, or as tokens come: where the past is held as it is, to rounding the same."""
    parts = parts_of(decoder)
    g = torch.Generator().manual_seed(1)
    for part in parts.values():
        for p in part.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    text = prompt(5, 14)
    whole = Layers(model(), Full(), parts)
    with torch.inference_mode():
        expected = decoder.taught(parts, whole.rise(text, decoder.tap), whole.head)
    said = []

    def listen(module, args, output):
        said.append(output)

    stack = Layers(model(), make(), parts)
    hooks = [part.register_forward_hook(listen) for part in parts.values()]
    with torch.inference_mode():
        early = stack.rise(text[:, :6], decoder.tap)
        stack.answer(text[:, :6], early, decoder.tap)
        for part in parts.values():
            part(early, 0, functools.partial(stack.mix, 0))
        stack.settle(6)
        for at, size in ((6, 1), (7, 3), (10, 1), (11, 3)):
            early = stack.rise(text[:, at : at + size], decoder.tap)
            for part in parts.values():
                part(early, at, functools.partial(stack.mix, 0))
            stack.answer(text[:, at : at + size], early, decoder.tap)
            stack.settle(size)
        for hook in hooks:
            hook.remove()
        # 14 tokens are fewer than the residual, so nothing is quantized yet
        torch.testing.assert_close(stack.head(torch.cat(said, 1)), expected, rtol=1e-6, atol=1e-6)
