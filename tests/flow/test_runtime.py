"""States inside transformers: `generate` as with its own cache, padding, beams, drafts, prompts that are kept, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import laconic
from laconic import runtime, stepping
from laconic.core.errors import UserError
from laconic.kernels.attention import MOST
from laconic.kernels.native import native
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi

KIVI = "cache.store.kivi(bits=2, group=16, residual=32)"
STEPS = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}


def tiny(kind: str = "Llama", **knobs: object) -> PreTrainedModel:
    torch.manual_seed(0)
    plain = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**{**plain, **knobs})
    # in fp64, codes do not hang on the order of sums
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).double().eval()


def ids(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["greedy", "beams", "drafts"])
def test_the_full_cache_is_transformers_own(llama: PreTrainedModel, extra: dict[str, int]) -> None:
    prompt = ids(1 if "prompt_lookup_num_tokens" in extra else 3, 50)
    own = llama.generate(prompt, past_key_values=DynamicCache(config=llama.config), **STEPS, **extra)
    cache = laconic.cache(llama, "cache.store.full")
    assert torch.equal(llama.generate(prompt, past_key_values=cache, **STEPS, **extra), own)
    assert cache.get_seq_length() == 73


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {}),
        ("Gemma2", {"sliding_window": 16, "head_dim": 8}),
        ("Falcon", {"multi_query": True, "alibi": False}),
    ],
)
def test_other_decoders(kind: str, knobs: dict[str, object]) -> None:
    model = tiny(kind, **knobs)
    prompt = ids(2, 40)
    cache = laconic.cache(model, "cache.store.full")
    assert torch.equal(model.generate(prompt, past_key_values=cache, **STEPS), model.generate(prompt, **STEPS))
    # layers with a window keep transformers' own cache, and count
    windows = sum(cache.is_sliding)
    assert windows == (1 if kind == "Gemma2" else 0)
    assert cache.nbytes - cache.state.nbytes == windows * 2 * 2 * 15 * 16 * 8
    held = laconic.cache(model, KIVI)
    model.generate(prompt, past_key_values=held, **STEPS)
    assert held.state.nbytes < 0.6 * cache.state.nbytes


@pytest.mark.parametrize("method", ["cache.store.full", KIVI])
def test_left_padded_rows_answer_as_alone(llama: PreTrainedModel, method: str) -> None:
    prompt, mask = ids(3, 70), torch.ones(3, 70, dtype=torch.long)
    starts = (33, 0, 5)
    for i, start in enumerate(starts):
        mask[i, :start] = 0
    cache = laconic.cache(llama, method)
    together = llama.generate(prompt, attention_mask=mask, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **STEPS)
    for i, start in enumerate(starts):
        one = laconic.cache(llama, method)
        alone = llama.generate(prompt[i : i + 1, start:], past_key_values=one, output_logits=True, return_dict_in_generate=True, **STEPS)
        assert torch.equal(together.sequences[i, 70:], alone.sequences[0, 70 - start :])
        logits = [torch.stack(out.logits, 1) for out in (together, alone)]
        torch.testing.assert_close(logits[0][i], logits[1][0], rtol=1e-9, atol=1e-9)
        # and holds the same: codes, scales and zeros to the bit
        held = cache.state.fork(torch.tensor([i])).tensors()
        for name, tensor in one.state.tensors().items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-9, atol=1e-9)


def test_padding_would_be_seen(llama: PreTrainedModel) -> None:
    """What the hook is for: without the mask, padding lies in the groups of the first block."""
    prompt, mask = ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :33] = 0
    found = []
    for given in (mask, None):
        cache = laconic.cache(llama, KIVI)
        with torch.no_grad():
            llama(prompt, attention_mask=given, past_key_values=cache)
        found.append(cache.state.layers[0].count)
    assert found == [(37, 70), (70, 70)]


def test_drafts_that_are_refused_leave_no_trace(llama: PreTrainedModel) -> None:
    prompt = ids(1, 60)
    for method in ("cache.store.full", KIVI):
        plain, drafted = laconic.cache(llama, method), laconic.cache(llama, method)
        a = llama.generate(prompt, past_key_values=plain, **STEPS)
        b = llama.generate(prompt, past_key_values=drafted, prompt_lookup_num_tokens=5, **STEPS)
        drafted.settle()
        assert {had.count for cache in (plain, drafted) for had in cache.state.layers.values()} == {(83,)}
        if method == "cache.store.full":
            # kivi's may differ: tokens of one draft read each other before a block is quantized
            assert torch.equal(a, b)
            for name, tensor in plain.state.tensors().items():
                torch.testing.assert_close(drafted.state.tensors()[name], tensor, rtol=1e-9, atol=1e-9)


def test_crop_takes_back_what_was_just_appended(llama: PreTrainedModel) -> None:
    cache = laconic.cache(llama, KIVI)
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :10] = 0
    longer = torch.cat([mask, mask.new_ones(2, 4)], 1)
    with torch.no_grad():
        llama(prompt, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UserError, match="activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        before = {name: one.clone() for name, one in cache.state.tensors().items()}
        llama(ids(2, 4, 1), attention_mask=longer, past_key_values=cache)
        with pytest.raises(UserError, match="here 4 tokens"):
            cache.crop(-5)
        cache.crop(-4)
    assert cache.get_seq_length() == 60
    assert all(torch.equal(one, before[name]) for name, one in cache.state.tensors().items())


def test_a_prompt_is_kept_and_copied(llama: PreTrainedModel) -> None:
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    first = laconic.cache(llama, KIVI)
    with torch.no_grad():
        llama(prompt[:, :50], attention_mask=mask[:, :50], past_key_values=first)
    answers = []
    for _ in range(2):
        cache = copy.deepcopy(first)
        answers.append(llama.generate(prompt, attention_mask=mask, past_key_values=cache, **STEPS))
        assert cache.get_seq_length() == 83
    assert torch.equal(*answers)
    assert first.get_seq_length() == 50
    first.reset()
    assert (first.get_seq_length(), first.nbytes) == (0, 0)


def test_rows_repeat(llama: PreTrainedModel) -> None:
    cache, prompt = laconic.cache(llama, KIVI), ids(2, 60)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        logits = llama(ids(2, 1, 1).repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[2], logits[3], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("cache.store.kivy", "did you mean 'cache.store.kivi'"),
        ("quantize.round.rtn", "unknown cache"),
        ("cache.store.kivi(bit=2)", "did you mean 'bits'"),
        ("cache.store.kivi(bits=9)", "1 to 8"),
        ("cache.store.kivi(layers={})", "no knob 'layers'"),
        ("cache.store.kivi(", "not understood"),
        ("cache.store.kivi(bits=open)", "unknown method 'open'"),
    ],
)
def test_what_is_no_cache_is_refused(llama: PreTrainedModel, method: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        laconic.cache(llama, method)


def test_models_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(UserError, match="no model of transformers"):
        laconic.cache(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="nothing to hold"):
        laconic.cache(tiny("Mistral", sliding_window=16))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UserError, match="encoder and a decoder"):
        laconic.cache(t5)


def dense_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without native kernels: attention over dense keys and values."""
    monkeypatch.setattr(runtime, "native", lambda: None)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens in each attention over what is held."""
    found: list[int] = []
    for cls in (Full, Kivi):
        plain = cls.attend

        def attend(self, query, *rest, plain=plain, **named):  # type: ignore[no-untyped-def]
            found.append(query.shape[2])
            return plain(self, query, *rest, **named)

        monkeypatch.setattr(cls, "attend", attend)
    return found


needs_kernels = pytest.mark.skipif(native() is None, reason="no native kernels here")


@needs_kernels
@pytest.mark.parametrize("method", ["cache.store.full", KIVI, "cache.store.kivi(bits=4, group=16, residual=32)"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["greedy", "beams", "drafts"])
def test_generation_reads_what_is_held(monkeypatch: pytest.MonkeyPatch, method: str, extra: dict[str, int]) -> None:
    model = tiny(hidden_size=128, head_dim=32).float()
    prompt = ids(1 if "prompt_lookup_num_tokens" in extra else 3, 50)
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[0, :21] = 0
    asked = {**STEPS, **extra, "attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    calls = counted(monkeypatch)
    ours = model.generate(prompt, past_key_values=laconic.cache(model, method), **asked)
    if not extra:
        # every token after the prompt's, in both layers
        assert calls == [1] * 2 * 23
    assert calls and model.config._attn_implementation == "sdpa"
    del calls[:]
    dense_way(monkeypatch)
    theirs = model.generate(prompt, past_key_values=laconic.cache(model, method), **asked)
    assert not calls
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_in_16_bits_both_ways_agree_to_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny(hidden_size=128, head_dim=32).bfloat16(), ids(2, 90)
    found = []
    for _ in range(2):
        cache = laconic.cache(model, KIVI)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            found.append(torch.cat([model(ids(2, 1, i), past_key_values=cache).logits for i in range(40)], 1).float())
        dense_way(monkeypatch)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-2


@needs_kernels
def test_what_is_more_than_causal_goes_the_dense_way(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    calls, prompt = counted(monkeypatch), ids(1, 40)
    odd = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    odd[..., 5:9] = False
    with torch.no_grad():
        found = []
        for cache in (laconic.cache(llama, "cache.store.full"), DynamicCache(config=llama.config)):
            llama(prompt, past_key_values=cache)
            found.append(llama(ids(1, 1, 1), attention_mask=odd, past_key_values=cache).logits)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        assert not calls
        # many tokens at once
        cache = laconic.cache(llama, "cache.store.full")
        llama(prompt, past_key_values=cache)
        llama(ids(1, MOST + 1), past_key_values=cache)
        assert not calls
        llama(ids(1, MOST), past_key_values=cache)
        assert calls == [MOST] * 2
        # and an implementation of attention that is not torch's
        del calls[:]
        eager = copy.deepcopy(llama)
        eager.set_attn_implementation("eager")
        cache = laconic.cache(eager, "cache.store.full")
        eager(prompt, past_key_values=cache)
        eager(ids(1, 1, 1), past_key_values=cache)
        assert not calls and eager.config._attn_implementation == "eager"


@needs_kernels
def test_a_model_that_fails_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    cache = laconic.cache(model, "cache.store.full")
    with pytest.raises(IndexError), torch.no_grad():
        model(torch.full((1, 3), 1000), past_key_values=cache)
    assert model.config._attn_implementation == "sdpa" and not cache.ours


@needs_kernels
def test_a_cache_is_differentiable_where_queries_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny().float(), ids(1, 40)
    grads = []
    for _ in range(2):
        cache = laconic.cache(model, "cache.store.full")
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        model.zero_grad()
        model(ids(1, 1, 1), past_key_values=cache).logits.sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        dense_way(monkeypatch)
    assert grads[0].any()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


class Seen:
    """Counts attention by blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.shares = 0, []
        real = runtime.block_attention

        def counted(*args: object, **more: object) -> Tensor:
            self.calls += 1
            self.shares.append(float(args[3].float().mean()))
            return real(*args, **more)

        for module in (runtime, stepping):
            monkeypatch.setattr(module, "block_attention", counted)


WHOLE, SOME = "xattention(tau=1.0, block=16, stride=4)", "attention.sparse.xattention(tau=0.3, block=16, stride=4)"


def test_prompts_attend_by_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, prompt, seen = tiny(), ids(2, 100), Seen(monkeypatch)
    with torch.inference_mode():
        before, own = model(prompt).logits, model.generate(prompt, **STEPS)
        assert laconic.attend(model, WHOLE) is model
        torch.testing.assert_close(model(prompt).logits, before)
        assert seen.calls == 2
        # tokens one by one attend to all that is there
        assert torch.equal(model.generate(prompt, **STEPS), own) and seen.calls == 4
        for cache in ("cache.store.full", KIVI):
            model.generate(prompt, past_key_values=laconic.cache(model, cache), **STEPS)
        assert seen.calls == 8
        laconic.attend(model, SOME)
        part = model(prompt).logits
        # the first two blocks see all that they may
        torch.testing.assert_close(part[:, :32], before[:, :32])
        assert not torch.allclose(part, before, rtol=1e-2) and max(seen.shares[-2:]) < min(seen.shares[:2])
        # padding, short prompts and other implementations are computed as before
        calls = seen.calls
        mask = torch.ones_like(prompt)
        mask[0, :5] = 0
        model(prompt, attention_mask=mask)
        model(prompt[:, :31])
        assert seen.calls == calls
        model.save_pretrained(tmp_path)
        assert "pattern" not in (tmp_path / "config.json").read_text()
        laconic.attend(model, None)
        torch.testing.assert_close(model(prompt).logits, before)
        assert seen.calls == calls and model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
def test_a_tape_reads_prompts_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, seen = tiny().float(), ids(1, 100), Seen(monkeypatch)
    laconic.attend(model, SOME)
    steps = stepping.steps_of(model)
    assert isinstance(steps, stepping.Steps)
    with torch.inference_mode():
        wanted = model(prompt).logits
        found = steps.answer(prompt).logits
    assert seen.calls == 4
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_attention_that_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"unknown attention 'xatention'.*xattention"):
        laconic.attend(llama, "xatention")
    with pytest.raises(UserError, match=r"cache\.store\.full"):
        laconic.attend(llama, "cache.store.full")
    with pytest.raises(UserError, match="tau"):
        laconic.attend(llama, "xattention(tau=2.0)")
    with pytest.raises(UserError, match="no model of transformers"):
        laconic.attend(torch.nn.Linear(2, 2))
