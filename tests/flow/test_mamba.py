"""The small Mamba as shipped, and the script that trains it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from laconic.core.errors import UserError
from laconic.zoo import corpus, mamba, nano

# nats per token over a part of the certify list, which measures 4.04 whole; the rest is room for another Python's standard library
BOUND = 4.4


def test_the_folder_is_whole_and_small():
    files = {p.name: p for p in mamba.path().iterdir()}
    assert files.keys() == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in files.values()) <= 3_000_000
    record = json.loads(files["training.json"].read_text())
    assert files["README.md"].read_text() == mamba.SUBJECT.card(record)
    assert f"| certify | {record['losses']['certify']:.4f} | {math.exp(record['losses']['certify']):.2f} |" in mamba.SUBJECT.card(record)


def test_it_has_learned_and_its_open_mixer_computes_what_transformers_computes():
    model, tokenizer, _ = nano.load(mamba.path())
    ids = torch.tensor([tokenizer.encode(corpus.named("certify")[0][1][3000:]).ids[:384]])
    with torch.no_grad():
        plain = model.eval()(ids, use_cache=False).logits
        opened = mamba.opened(model)(ids, use_cache=False).logits
    assert float((opened - plain).norm() / plain.norm()) < 1e-5
    loss = torch.nn.functional.cross_entropy(plain[0, :-1], ids[0, 1:])
    assert float(loss) < BOUND
    with torch.no_grad():
        back = mamba.plain(model).eval()(ids, use_cache=False).logits
    assert torch.equal(back, plain)


def test_a_step_of_training_moves_all_parameters_and_two_runs_are_one():
    made = []
    for _ in range(2):
        model = mamba.opened(mamba.new_model())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        text = torch.arange(40) % 7
        stream = nano.Stream([(text.numpy().astype("uint16"), 40)], seed=0, lanes=2)
        recipe = nano.Recipe(tokens=64, batch=32, short=16, micro=16, warmup=1)
        nano.fit(
            model, stream, recipe, 1, mamba.path(), lambda m: 0.0, lambda *_: None, lambda _: None, compiled=False, hidden=mamba.PROJECTIONS
        )
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        made.append(model)
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))


def test_what_is_wrong_is_said_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mamba.main(["--minutes", "0"])
    assert "must be above 0" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds no training\.json"):
        nano.load(tmp_path)
