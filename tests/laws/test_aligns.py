"""The laws of Align, run over every method of it: what a model computes stays, whatever the method was shown."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from laconic.aligning import EXACT, Aligned, align
from laconic.core.site import Norm, Rotate
from laconic.core.transform import Align, Change, Stretched, Turned
from laconic.kernels.hadamard import hadamard
from laconic.models import open_model
from laconic.pipeline import finished_logits
from laconic.recipe import Aligning

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)


def methods() -> list[tuple[str, Align]]:
    """Every method with its defaults, and with each other word or answer that one of its knobs may be."""
    made = []
    for path, cls in found.classes(Align):
        made.append((path, cls()))
        for field in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls)[field.name]
            words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (True, False) if hint is bool else ()
            made += [(f"{path}({field.name}={word})", cls(**{field.name: word})) for word in words if word != field.default]
    return made


METHODS = methods()
BASE = {"vocab_size": 64, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "mamba": {"hidden_size": 24, "state_size": 5, "time_step_rank": 3, "tie_word_embeddings": False},
    "mamba-tied": {"hidden_size": 24, "state_size": 8, "time_step_rank": 4, "tie_word_embeddings": True, "use_bias": True},
    "llama": {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    # norms that add one to what they store
    "gemma": {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    # norms with shifts; a rectifier between up and down
    "opt": {"hidden_size": 32, "ffn_dim": 40, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    # matrices stored the other way round, q, k and v in one
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
    # a norm that attention and feed-forward share
    "phi": {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "tie_word_embeddings": False},
    # experts and a router behind one norm
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Desk:
    """A journal in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, typing.Any] = {}

    def done(self, key):
        return self.kept[key][0] if key in self.kept else None

    def finish(self, key, value, tensors=None):
        self.kept[key] = value, tensors or {}

    def tensors(self, key):
        return self.kept[key][1]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    def make(case: str, spoil: str = ""):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.split("-")[0], **BASE, **MODELS[case]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "A_log" not in name:
                    parameter.normal_(0, 0.2)
                elif "norm" in name or "ln_" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape))
                    if spoil == "dead norms":
                        parameter[::3] = 0.0
                if spoil == "dead channels" and name.endswith(("out_proj.weight", "in_proj.weight", "o_proj.weight")):
                    parameter[:, ::3] = 0.0
                if spoil == "loud channels" and "norm" in name:
                    parameter[1] = 1e4
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return open_model(folder)

    return make


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(seed))


def rewritten(source, method: Align, inputs: torch.Tensor, work: Desk | None = None) -> Aligned:
    work = work or Desk()
    return align(source, inputs, Aligning(method="under test"), method, batch=2, work=work, progress=lambda *_: None)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(("path", "method"), METHODS, ids=[p for p, _ in METHODS])
def test_what_is_rewritten_computes_the_same(opened, path, method, case):
    source = opened(case)
    aligned = rewritten(source, method, ids())
    before, after = (next(finished_logits(one, ids(2), 4)) for one in (source, aligned.exact()))
    assert float((after - before).norm()) <= EXACT * float(before.norm())
    assert aligned.record["difference"] <= EXACT
    for move in aligned.moves.values():
        if isinstance(move, Turned):
            torch.testing.assert_close(move.matrix @ move.matrix.T, torch.eye(len(move.matrix)).double(), rtol=0, atol=1e-9)
        else:
            assert isinstance(move, Stretched) and torch.isfinite(move.factors).all() and (move.factors > 0).all()
    # a part of a tensor that is read by rows is that part of the whole
    for name in aligned.infos:
        whole = aligned.read(name)
        assert torch.isfinite(whole).all() and tuple(whole.shape) == aligned.infos[name].shape
        if whole.dim():
            torch.testing.assert_close(aligned.read_rows(name, 1, 3), whole[1:3], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spoil", ["dead norms", "dead channels", "loud channels", "one token"])
@pytest.mark.parametrize(("path", "method"), METHODS, ids=[p for p, _ in METHODS])
def test_what_it_was_shown_may_be_poor(opened, path, method, spoil):
    for case in ("mamba", "llama"):
        aligned = rewritten(opened(case, spoil), method, ids()[:1, :1] if spoil == "one token" else ids())
        assert aligned.record["difference"] <= EXACT


@dataclasses.dataclass(frozen=True)
class Both(Align):
    """A stream that is turned and norms that are stretched: what a norm gives is stretched in the basis that it was turned to."""

    def looks(self, edge):
        return ()

    def __call__(self, edge, read, stats):
        if edge.may(Rotate) is not None and edge.block == edge.width:
            return Change(move=((edge, Turned(hadamard(torch.eye(edge.width, dtype=torch.float64)))),))
        if any(isinstance(member.site.kind, Norm) for member in edge.writers):
            return Change(move=((edge, Stretched(0.5 + torch.rand(edge.width, generator=torch.Generator().manual_seed(0)))),))
        return Change()


def test_a_turned_stream_and_stretched_norms_go_together(opened):
    source = opened("llama")
    aligned = rewritten(source, Both(), ids())
    assert {type(move) for move in aligned.moves.values()} == {Turned, Stretched} and len(aligned.moves) == 6
    norm = "model.layers.0.input_layernorm"
    torch.testing.assert_close(aligned.read(f"{norm}.weight"), aligned.moves[norm].factors.float())


@pytest.mark.parametrize(("path", "method"), METHODS[:1], ids=[p for p, _ in METHODS[:1]])
def test_the_same_again_and_from_the_journal(opened, path, method):
    source, desk = opened("mamba"), Desk()
    first = rewritten(source, method, ids(), desk)
    second, third = rewritten(source, method, ids()), rewritten(source, method, ids(9), desk)
    for name in first.infos:
        assert torch.equal(first.read(name), second.read(name)) and torch.equal(first.read(name), third.read(name))
