"""Decoders as tapes of native steps: the logits of the model's own forward pass, however matrices are held and however tokens come."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from laconic import stepping
from laconic.artifact import put, round_inputs, thawed
from laconic.core.decoder import Draw
from laconic.core.errors import UserError
from laconic.core.packed import Dense, Held, Packed, Sum
from laconic.core.state import State
from laconic.decoding import Layers, body_of
from laconic.kernels.grids import Grid, encode, fit_range
from laconic.kernels.native import LEVELS, Native, native
from laconic.measurement import timed_generation
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi
from laconic.methods.decode.draft.kangaroo import Kangaroo
from laconic.methods.decode.sample.ancestral import Ancestral
from laconic.methods.prune.activation.chess import CHESS
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.models import open_model
from laconic.routing import begin, install, look, parts_of
from laconic.runtime import StateCache
from laconic.stepping import Steps, steps_of

KNOWN = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}
pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")


@pytest.fixture(params=["plain", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    assert there is not None
    if LEVELS.index(request.param) > LEVELS.index(there.module.best()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(stepping, "native", lambda: Native(there.module, request.param))
    return str(request.param)


def tiny(kind: str = "Llama", dtype: torch.dtype = torch.float32, **knobs: Any) -> PreTrainedModel:
    """Odd widths; norms and biases that are not one and zero."""
    torch.manual_seed(0)
    plain = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.15, "eos_token_id": None, "bos_token_id": None,
        "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**plain, **KNOWN.get(kind, {}), **knobs})
    model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            p.data += torch.randn_like(p) * 0.2
    return model.to(dtype).eval()


def hold(model: PreTrainedModel, **other: Packed) -> PreTrainedModel:
    """All its matrices in codes, grids in turn, or by name as told."""
    grids = Grid(4, 32), Grid(8, 16, True), Grid(3, None)
    for number, (name, layer) in enumerate(list(model.named_modules())):
        if isinstance(layer, nn.Linear):
            weight, grid = layer.weight.detach().float(), grids[number % len(grids)]
            scale, zero = fit_range(weight, grid)
            form = other.get(name.rpartition(".")[2]) or Grouped.of(
                tuple(weight.shape), grid, encode(weight, scale, zero, grid), scale, zero
            )
            put(model, name, Held(form, layer, layer.bias))
    return model


def ids(t: int, b: int = 1, vocabulary: int = 131) -> torch.Tensor:
    return torch.randint(1, vocabulary, (b, t), generator=torch.Generator().manual_seed(t + b))


def read(steps: Steps, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of tokens that come so many at a time."""
    with torch.inference_mode():
        found = []
        for part in tokens.split(sizes, 1):
            found.append(steps.answer(part).logits)
            steps.settle(part.shape[1])
    return torch.cat(found, 1)


def apart(model: PreTrainedModel, found: torch.Tensor, tokens: torch.Tensor) -> float:
    with torch.inference_mode():
        wanted = model(input_ids=tokens).logits.float()
    return float((found.float() - wanted).norm() / wanted.norm())


def made(model: PreTrainedModel) -> Steps:
    steps = steps_of(model)
    assert isinstance(steps, Steps), steps
    return steps


@pytest.mark.parametrize("kind", KNOWN)
def test_logits_are_the_models_own(kind: str, level: str) -> None:
    model = hold(tiny(kind))
    for b, sizes in ((1, [40, 1, 1, 3, 16, 17]), (3, [1, 1, 20, 1]), (1, [1] * 5)):
        tokens = ids(sum(sizes), b)
        assert apart(model, read(made(model), tokens, sizes), tokens) < 2e-5


def test_a_text_longer_than_a_page(level: str) -> None:
    model = hold(tiny())
    sizes = [250, 1, 1, 10, 300, 1, 16]
    tokens = ids(sum(sizes), 2)
    assert apart(model, read(made(model), tokens, sizes), tokens) < 2e-5


def test_a_long_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "PROMPT", 24)
    model, tokens = hold(tiny()), ids(101, 2)
    steps = made(model)
    with torch.inference_mode():
        found = [steps.answer(tokens[:, :90], keep=3).logits]
        steps.settle(90)
        found.append(steps.answer(tokens[:, 90:]).logits)
        wanted = model(input_ids=tokens).logits[:, 87:]
    assert steps.length == 90
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-3, atol=1e-3)


def held_every_way(dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """Matrices as they are, in codes, in numbers of 16 bits, in a sum that has no native product, tied, as dense copies."""
    yield tiny(dtype=dtype)
    kept = Dense(torch.randn(64, 64).bfloat16() * 0.1)
    low = Sum(Dense(torch.randn(64, 64).bfloat16() * 0.1), Dense(torch.randn(64, 64).bfloat16() * 0.1))
    yield hold(tiny(dtype=dtype), q_proj=kept, o_proj=low)
    tied = hold(tiny(dtype=dtype, tie_word_embeddings=True))
    yield tied
    thawed(tied, dtype)
    yield tied


def test_however_matrices_are_held(level: str) -> None:
    tokens = ids(30)
    for model in held_every_way(torch.float32):
        assert apart(model, read(made(model), tokens, [9, 1, 1, 19]), tokens) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mixtral"])
def test_what_is_left_out_for_a_token(kind: str, dtype: torch.dtype, level: str, tmp_path: Path) -> None:
    """Neurons and inputs below their thresholds: steps of the tape where a token comes alone, the model's own modules else."""
    model, tokens = tiny(kind, dtype), ids(24)
    model.save_pretrained(tmp_path)
    parts, _ = parts_of(open_model(tmp_path), CHESS(), model)
    install(model, parts)
    begin(parts, 0)
    look(model, parts, [ids(40, 3)])
    model.requires_grad_(False)
    steps = made(model)
    if kind in ("Llama", "Qwen3"):
        assert sum("Neurons" in told.what for told in steps._told.values()) == 3
        # every step of a token that comes alone is native
        steps._make_room(1, 1, 0)
        assert steps._tape.run(0, steps._ends, 1, 1, 0, 1) == steps._ends
    found = read(steps, tokens, [1] * 12 + [9, 1, 1, 1])
    if dtype == torch.float32:
        assert apart(model, found, tokens) < 2e-5
        return
    # thresholds are steps, so rounding may fall on the other side of one: of both, the tape is no further from the truth
    with torch.inference_mode():
        own = model(input_ids=tokens).logits
    assert apart(model.float(), found, tokens) < 1.1 * apart(model, own, tokens)


def test_in_16_bits_nearer_to_the_truth_than_the_model_itself(level: str) -> None:
    tokens = ids(30)
    for model in held_every_way(torch.bfloat16):
        found = read(made(model), tokens, [9, 1, 1, 19])
        with torch.inference_mode():
            own = model(input_ids=tokens).logits
        assert found.dtype == own.dtype == torch.bfloat16
        exact = copy.deepcopy(model)
        thawed(exact, torch.float32, lambda layer: layer._copy is None)
        for module in exact.modules():
            if isinstance(module, Held):
                module._copy = module._copy.float()
        for p in exact.parameters():
            p.data = p.data.float()
        assert apart(exact, found, tokens) < apart(exact, own, tokens) < 0.1


def test_inputs_in_8_bits(level: str) -> None:
    model = hold(tiny())
    round_inputs(model, 8)
    tokens = ids(30)
    assert apart(model, read(made(model), tokens, [12, 1, 1, 16]), tokens) < 2e-2


def test_what_is_not_settled_leaves_no_trace() -> None:
    model = hold(tiny())
    tokens, other = ids(20), ids(6, vocabulary=17)
    plain, steps = made(model), made(model)
    wanted = read(plain, tokens, [10, 4, 6])
    with torch.inference_mode():
        found = [steps.answer(tokens[:, :10]).logits]
        steps.settle(10)
        # six tokens of another text, of which two are the right ones
        steps.answer(torch.cat([tokens[:, 10:12], other[:, :4]], 1))
        steps.settle(2)
        assert steps.length == 12
        steps.answer(other)
        steps.settle(0)
        found.append(steps.answer(tokens[:, 12:]).logits)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat([wanted[:, :10], wanted[:, 12:]], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [Full, functools.partial(Kivi, bits=4, group=8, residual=16)])
def test_a_state_holds_the_past(make: Callable[[], State]) -> None:
    model = hold(tiny())
    for b, sizes in ((1, [40, 1, 1, 3, 20, 1]), (2, [20, 1, 30, 1])):
        tokens = ids(sum(sizes), b)
        steps, cache, found = Steps(model, make(), holds=True), StateCache(model, make()), []
        with torch.inference_mode():
            for part in tokens.split(sizes, 1):
                found.append(steps.answer(part).logits)
                steps.settle(part.shape[1])
            # as transformers generates: what comes after the first tokens comes one by one
            apart_by = [sizes[0], *[1] * sum(sizes[1:])]
            wanted = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split(apart_by, 1)]
        torch.testing.assert_close(torch.cat(found, 1), torch.cat(wanted, 1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no State"):
        Steps(model, holds=True)


def test_rows_are_picked_by_index() -> None:
    model = hold(tiny())
    texts = ids(12, 3)
    steps = made(model)
    read(steps, texts, [12])
    steps.fork(torch.tensor([2, 0]))
    chosen, more = texts[[2, 0]], ids(3, 2)
    whole = torch.cat([chosen, more], 1)
    found = torch.cat([read(made(model), chosen, [12]), read(steps, more, [1, 2])], 1)
    assert apart(model, found, whole) < 2e-5
    with pytest.raises(UserError, match="3 texts go on from 2"):
        steps.answer(ids(1, 3))
    with torch.inference_mode():
        steps.answer(ids(1, 2))
    with pytest.raises(ValueError, match="once pending tokens are settled"):
        steps.fork(torch.tensor([0]))


def test_layers_apart_are_the_whole() -> None:
    model = hold(tiny())
    tokens = ids(9)
    steps, plain = made(model), Layers(model, Full())
    with torch.inference_mode():
        for part in tokens.split([5, 1, 3], 1):
            # the first tokens of all are not taken back by a State
            for last in (1, 2) if steps.length else ():
                hidden, wanted = steps.rise(part, last), plain.rise(part, last)
                torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
                steps.settle(0)
                plain.settle(0)
            answers = [stack.answer(part, stack.rise(part, 2), 2, keep=1) for stack in (steps, plain)]
            torch.testing.assert_close(answers[0].logits, answers[1].logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(answers[0].hidden, answers[1].hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(steps.head(answers[1].hidden), answers[1].logits, rtol=1e-4, atol=1e-4)
            steps.settle(part.shape[1])
            plain.settle(part.shape[1])
    assert steps.layer_passes == plain.layer_passes
    with pytest.raises(ValueError, match="1 to 2, not 3"):
        steps.rise(tokens, 3)


@pytest.mark.parametrize("decoder", [Ancestral(), Kangaroo(tap=1, eta=0.05)])
def test_decoders_draw_the_same(decoder: Ancestral | Kangaroo) -> None:
    model = hold(tiny())
    parts = decoder.place(body_of(model.config), torch.Generator().manual_seed(0)).place
    for temperature in (0.0, 1.0):
        drawn = []
        for make in (Steps, Layers):
            draw = Draw(temperature, torch.Generator().manual_seed(3))
            with torch.inference_mode():
                drawn.append(torch.cat([one.tokens for one in decoder(make(model, Full(), parts), ids(7), limit=24, draw=draw)], 1))
        assert torch.equal(*drawn)


def test_numbers_that_are_not_finite_spread_as_in_the_model() -> None:
    model = hold(tiny())
    model.get_decoder().layers[1].input_layernorm.weight.data[5] = torch.nan
    found = read(Steps(model), ids(6), [4, 1, 1])
    assert bool(found.isnan().all())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: nn.Linear(2, 2), "Linear is no decoder of transformers"),
        (lambda: tiny("Mistral", sliding_window=16), "do not attend to all past tokens"),
        (lambda: tiny("Gemma"), "no tape is known for gemma"),
        (lambda: tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), "rotary embedding is dynamic"),
        (lambda: tiny(dtype=torch.float64), "float64"),
    ],
)
def test_what_no_tape_can_hold_is_named(model: Any, why: str) -> None:
    found = steps_of(model())
    assert isinstance(found, str)
    assert why in found


def test_parts_in_a_layer_and_other_logits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.get_decoder().layers[1].self_attn = nn.Identity()
    assert steps_of(model) == "Identity stands for attention in one of its layers"
    other = tiny()
    layer: Any = other.get_decoder().layers[0].self_attn
    # a scale that is not where the tape looks for it
    layer.register_forward_hook(lambda module, args, output: (output[0] * 1.1, *output[1:]))
    assert "from the model's own" in str(steps_of(other))


def test_another_feed_forward_layer_runs_as_a_whole() -> None:
    tokens = ids(30)
    model = hold(tiny())
    model.get_decoder().layers[1].mlp = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 64))
    assert apart(model, read(made(model), tokens, [20, 1, 9]), tokens) < 2e-5
    other = hold(tiny(hidden_act="gelu"))
    assert apart(other, read(made(other), tokens, [20, 1, 9]), tokens) < 2e-5


def test_layers_may_have_other_widths() -> None:
    """As heads and channels that were cut for good leave them."""
    model, tokens = tiny(num_attention_heads=4, num_key_value_heads=4), ids(30)
    one: Any = model.get_decoder().layers[1]
    narrow = {"q_proj": 32, "k_proj": 32, "v_proj": 32}
    for name, n in narrow.items():
        layer = getattr(one.self_attn, name)
        layer.weight = nn.Parameter(layer.weight.detach()[:n])
    one.self_attn.o_proj.weight = nn.Parameter(one.self_attn.o_proj.weight.detach()[:, :32].contiguous())
    for name in ("gate_proj", "up_proj"):
        getattr(one.mlp, name).weight = nn.Parameter(getattr(one.mlp, name).weight.detach()[:50])
    one.mlp.down_proj.weight = nn.Parameter(one.mlp.down_proj.weight.detach()[:, :50].contiguous())
    assert apart(model, read(made(model), tokens, [20, 1, 9]), tokens) < 2e-5
    one.self_attn.v_proj.weight = nn.Parameter(one.self_attn.v_proj.weight.detach()[:16])
    assert steps_of(model) == "the widths of its layers do not fit each other"
    headless = tiny()
    headless.lm_head = nn.Linear(32, 131)
    assert steps_of(headless) == "its head does not fit its layers"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing_but_the_order_of_sums(threads: None) -> None:
    model, tokens = hold(tiny(hidden_size=256, intermediate_size=640, num_attention_heads=8)), ids(40)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(read(made(model), tokens, [30, 1, 9]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-4)


def test_where_time_goes_is_said() -> None:
    model = hold(tiny(), o_proj=Sum(Dense(torch.randn(64, 64) * 0.1), Dense(torch.randn(64, 64) * 0.1)))
    steps = made(model)
    with torch.inference_mode():
        found = steps.spent(ids(20), 3)
    for phase, by in (("prefill", "torch"), ("decode", "native")):
        rows = {row.what: row for row in found[phase]}
        assert rows["norm"].times == 7
        assert rows["attention"].times == 3
        # twenty tokens at once are torch's
        assert rows["attention"].by == by
        assert rows["product 64 x 64, Sum"].by == "torch"
        assert rows["product 64 x 64, Sum"].nbytes == 3 * 2 * 64 * 64 * 4
        assert all(row.ms > 0 for row in found[phase])
        assert [row.ms for row in found[phase]] == sorted((row.ms for row in found[phase]), reverse=True)
    # codes, two scales and two zeros a row
    assert {row.what: row.nbytes for row in found["decode"]}["product 131 x 64, 4 bits, groups of 32"] == 131 * (32 + 4 + 1)
    assert steps.length == 23


def test_timing_a_stack_draws_what_the_model_draws() -> None:
    model = hold(tiny())
    prefill, decode = timed_generation(model, ids(8), 4, made(model))
    assert prefill > 0
    assert decode > 0
