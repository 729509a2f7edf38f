"""The script that trains a small BERT: what it hides, what it moves."""

from __future__ import annotations

import pytest
import torch

from laconic.zoo import bert, nano, small


def test_tokens_are_hidden_replaced_and_kept_in_their_shares():
    ids = torch.randint(3, bert.VOCABULARY, (200, 128), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    shown, asked = bert.masked(ids)
    assert not bool(asked[:, 0].any()) and torch.equal(shown[~asked], ids[~asked])
    assert 0.14 < float(asked.float().mean()) < 0.16
    hidden, other = (shown == bert.MASK)[asked].float().mean(), ((shown != ids) & (shown != bert.MASK))[asked].float().mean()
    assert 0.78 < float(hidden) < 0.82 and 0.08 < float(other) < 0.12
    # the same rows are always asked the same, others otherwise
    again, elsewhere = bert.masked(ids)[0], bert.masked(ids + 1)[1]
    assert torch.equal(again, shown) and not torch.equal(elsewhere, asked)


def test_two_runs_of_training_are_one_and_move_what_they_should(tmp_path):
    made = []
    for _ in range(2):
        model = bert.new_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        stream = nano.Stream([((torch.arange(60) % 50 + 3).numpy().astype("uint16"), 40)], seed=0, lanes=2)
        recipe = nano.Recipe(tokens=64, batch=64, short=32, micro=32, warmup=1)
        nano.fit(model, stream, recipe, 1, tmp_path, lambda m: 0.0, lambda *_: None, lambda _: None, compiled=False,
                 hidden=bert.SUBJECT.projections, loss=bert.loss_of)  # fmt: skip
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {"bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.word_embeddings.weight"} <= moved
        made.append(model)
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))


def test_what_is_wrong_is_said_before_training(capsys):
    for arguments in (["--minutes", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            bert.main(arguments)
        assert "must be above 0" in capsys.readouterr().err
    assert small.path("bert") == bert.path()
