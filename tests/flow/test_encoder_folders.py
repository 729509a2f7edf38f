"""Folders of transformers' classes without a row of data: opened, traced, compressed, loaded back as transformers' own class."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic
from laconic.artifact import verify_hashes
from laconic.core.errors import UserError
from laconic.core.packed import Held

HERE = Path(__file__).parent


def _encoders() -> Any:
    spec = importlib.util.spec_from_file_location("encoders", HERE / "encoders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


encoders = _encoders()


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's file of data is on the path; tiny tensors are slower with more threads."""
    monkeypatch.syspath_prepend(str(HERE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("encoders", None)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": encoders.tokens(3), "attention_mask": torch.ones(3, 10, dtype=torch.int64)}


# case -> the class as transformers has it, the data's function, a call of it
CASES: dict[str, tuple[Any, str, Any]] = {
    "bert": (lambda: encoders.bert(), "bert_data", _tokens),
    "masked": (lambda: encoders.masked(), "masked_data", _tokens),
    "vit": (lambda: encoders.vit(), "vit_data", lambda: {"pixel_values": encoders.pictures(3)}),
    "clip": (
        lambda: encoders.clip().clip,
        "clip_given",
        lambda: {"pixel_values": encoders.pictures(3), "input_ids": encoders.ZeroShot.prompts()},
    ),
    "whisper": (
        lambda: encoders.whisper().whisper,
        "whisper_data",
        lambda: {"input_features": encoders.speech(3), "decoder_input_ids": torch.tensor([[1, 5, 9]] * 3)},
    ),
    "t5": (lambda: encoders.t5().t5, "t5_data", lambda: {**_tokens(), "decoder_input_ids": torch.tensor([[0, 5]] * 3)}),
}


def folder(case: str, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: Any = CASES[case][0]().to(dtype)
    model.save_pretrained(path)
    return model  # type: ignore[no-any-return]


def answer(model: nn.Module, case: str) -> Tensor:
    with torch.no_grad():
        out: Any = model(**CASES[case][2]())
    return out.logits_per_image if case == "clip" else out.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_the_same_command(tmp_path: Path, case: str) -> None:
    model = folder(case, tmp_path / "model")
    data = f"encoders:{CASES[case][1]}"
    said: list[str] = []
    planned = laconic.plan(str(tmp_path / "model"), data, budget="bits=8", recipe="gptq", log=said.append)
    settled = {name for choice in planned["choices"] for name in choice["covers"]}
    named = settled | {entry["tensor"] for entry in planned["kept"]}
    # every parameter is settled or named, a tied one under one of its names
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in named} == set(first)

    out = tmp_path / "out"
    laconic.compress(str(tmp_path / "model"), data, budget="bits=8", recipe="gptq", out=out, log=said.append)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["reload"]["difference"] <= 1e-4
    assert certificate["bytes"] <= sum(p.numel() for p in model.parameters())
    verify_hashes(out)
    # transformers' own class, called as transformers says, by both doors
    mine, theirs = laconic.load(out), type(model).from_pretrained(out)
    assert type(mine) is type(model)
    assert {id(layer.weight) for layer in mine.modules() if isinstance(layer, Held)}
    assert torch.allclose(answer(mine, case), answer(theirs, case), atol=1e-5)
    close = (answer(mine, case) - answer(model, case)).norm() / answer(model, case).norm()
    assert 0 < close < 0.1
    # what the certificate says can be measured again from the folder alone
    again = laconic.measure(out, speed=False, log=said.append)
    assert again["kl_mean"] == pytest.approx(certificate["quality"]["kl_mean"], rel=1e-3, abs=1e-7)
    assert "perplexity" not in again and ("accuracy" in again) == (case not in ("masked",))


def test_the_default_recipe_on_a_bf16_folder(tmp_path: Path) -> None:
    folder("vit", tmp_path / "model", torch.bfloat16)
    out = tmp_path / "out"
    laconic.compress(str(tmp_path / "model"), "encoders:vit_data", budget="bits=5", out=out, log=lambda _: None)
    found = laconic.measure(out, speed=False, log=lambda _: None)
    assert found["bits_per_weight"] <= 5 and found["top1_agreement"] > 0.5


def test_padded_rows_are_masked(tmp_path: Path) -> None:
    from laconic.models import open_model

    folder("masked", tmp_path / "model")
    source = open_model(str(tmp_path / "model"))
    rows = encoders.masked_data()[0]
    source.trace(rows[:1])
    fed, own = source.load(torch.float32), CASES["masked"][0]()
    with torch.no_grad():
        expected = own(input_ids=rows[:2], attention_mask=rows[:2].ne(0).long()).logits
        assert torch.allclose(fed(rows[:2]), expected, atol=1e-6)
        assert not torch.allclose(own(input_ids=rows[:2]).logits, expected, atol=1e-3)


def refused(path: Path, data: str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        laconic.compress(str(path), data, budget="bits=8", recipe="rtn", out=path.parent / "refused", log=lambda _: None)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (path.parent / "refused").exists()


def test_what_cannot_be_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder("clip", tmp_path / "clip")
    refused(tmp_path / "clip", "encoders:clip_data", "CLIPModel cannot be run", "given")
    bert: Any = folder("bert", tmp_path / "bert")
    refused(tmp_path / "bert", "encoders:vit_data", "BertForSequenceClassification cannot be run on inputs")
    with pytest.raises(UserError, match="needs data"):
        laconic.compress(str(tmp_path / "bert"), budget="bits=8", out=tmp_path / "no", log=lambda _: None)
    # a class without a head has nothing to compare
    bert.bert.save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", "encoders:bert_data", "BertModel gives no logits", "with a head")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    for changed, words in (
        ({"architectures": ["BertForNothing"]}, ("names BertForNothing", "package.module:function")),
        ({"architectures": None}, ("names no architecture",)),
        ({"num_hidden_layers": 4}, ("lacks 16 tensors", "correct config.json")),
        ({"hidden_size": 64}, ("cannot be built as BertForSequenceClassification",)),
    ):
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config | changed))
        refused(tmp_path / "bert", "encoders:bert_data", *words)
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(encoders.bert_data, "given", {"pixel_values": torch.zeros(1)}, raising=False)
    monkeypatch.setitem(sys.modules, "encoders", encoders)
    refused(tmp_path / "bert", "encoders:bert_data", "takes no input 'pixel_values'")
    monkeypatch.setattr(encoders.bert_data, "given", [1], raising=False)
    refused(tmp_path / "bert", "encoders:bert_data", "is no dict of names and tensors")
