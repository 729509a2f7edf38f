"""Data as a user gives it: real files, real tokenizers, real functions."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic import models
from laconic.core.errors import UserError
from laconic.data import Samples, Split, Texts, open_data

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LACONIC_DATA", ROOT.parent / "shared" / "data"))
WORDS = ["river", "stone", "light", "under", "seven", "apple", "window", "garden", "quiet", "morning", "paper", "engine", "table", "bridge"]


def document(i: int, words: int = 30) -> str:
    """A text of its own for each i."""
    digest = hashlib.sha256(str(i).encode()).digest() * 4
    return f"{i} " + " ".join(WORDS[b % len(WORDS)] for b in digest[:words])


def save_model(folder: Path, *, bos: bool = False, vocabulary: int = 400, template: str | None = None, context: int = 64) -> Path:
    """A small Llama with random weights and a byte-level BPE, as a Hugging Face folder. The tokenizer puts <s> first if `bos`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tok = Tokenizer(kinds.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([document(i, 60) for i in range(40)], trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=context, tie_word_embeddings=True, **shape)
    ).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> models.Source:
    return models.open_model(save_model(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> models.Source:
    return models.open_model(save_model(tmp_path_factory.mktemp("bos"), bos=True))


def write_lines(path: Path, texts: list[Any]) -> str:
    body = "".join(json.dumps(t) + "\n" for t in texts).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return str(path)


def words_of(part: Samples, tokenizer: Any) -> set[str]:
    """The numbers that begin the documents of a part."""
    text = " ".join(tokenizer.decode(row).replace("<s>", " ").replace("</s>", " ") for row in part.inputs)
    return {w for w in text.split() if w.isdigit() and len(w) == 4}


def parts_of(split: Split) -> tuple[Samples, Samples, Samples]:
    return split.calibrate, split.search, split.certify


def same(a: Split, b: Split) -> bool:
    return all(x.sha256 == y.sha256 and torch.equal(x.inputs, y.inputs) for x, y in zip(parts_of(a), parts_of(b), strict=True))


# ---- text


def test_stories_are_split_by_lines() -> None:
    stories = DATA / "text" / "tinystories_1000.jsonl.gz"
    if not stories.is_file():
        pytest.skip(f"no real data at {DATA}")
    source = models.open_model(DATA / "stories260k")
    split = open_data(str(stories), source, seed=0)
    assert split.metric == "kl" and [p.inputs.shape for p in parts_of(split)] == [(128, 512), (32, 512), (64, 512)]
    assert [split.record["parts"][p]["documents"] for p in ("calibrate", "search", "certify")] == [500, 250, 250]
    assert split.record["files"] == {stories.name: hashlib.sha256(stories.read_bytes()).hexdigest()}
    for part in parts_of(split):
        assert bool((part.inputs[:, 0] == 1).all()), "every row begins with <s>"
        # the rest of a row is text of the file, stories parted by <s>, nothing lost between the rows of one part
        assert int(part.inputs.max()) < 512 and part.targets is None and part.length == 512
    tokenizer = source.tokenizer()
    with gzip.open(stories, "rt", encoding="utf-8") as lines:
        texts = {json.loads(line).strip() for line in lines}
    whole: list[set[str]] = []
    for part in parts_of(split):
        inner = [piece for row in part.inputs for piece in tokenizer.decode(row).split("<s>")[2:-1]]
        assert len(inner) > 5 and all(piece.strip() in texts for piece in inner)
        whole.append({piece.strip() for piece in inner})
    assert not whole[0] & whole[1] and not whole[0] & whole[2] and not whole[1] & whole[2]
    few = open_data(str(stories), source, seed=0, limits=(9, 4, 5))
    assert same(few, open_data(str(stories), source, seed=0, limits=(9, 4, 5)))
    assert not same(few, open_data(str(stories), source, seed=1, limits=(9, 4, 5)))


def test_parts_never_share_a_document(tmp_path: Path, plain: models.Source) -> None:
    # each document twice, once in each of two files of unlike kinds; the copies differ by blanks around them only
    texts = [document(1000 + i) for i in range(80)]
    folder = tmp_path / "all"
    (folder / "deep").mkdir(parents=True)
    write_lines(folder / "deep" / "a.jsonl.gz", texts)
    (folder / "b.txt").write_text("\n \t\n".join(f"{t}\n" for t in texts))
    (folder / "ignored.csv").write_bytes(b"\xff")
    split = open_data(str(folder), plain, seed=0, limits=(999, 999, 999))
    seen = [words_of(part, plain.tokenizer()) for part in parts_of(split)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert split.record["duplicates"] == 80 and set(split.record["files"]) == {"b.txt", "deep/a.jsonl.gz"}
    assert [split.record["parts"][p]["documents"] for p in ("calibrate", "search", "certify")] == [40, 20, 20]
    # what is read from either file alone gives the same rows: order and kind of files do not matter
    assert same(split, open_data(str(folder / "deep" / "a.jsonl.gz"), plain, seed=0, limits=(999, 999, 999)))


def test_separate_certify(tmp_path: Path, plain: models.Source) -> None:
    main = write_lines(tmp_path / "main.jsonl", [document(1000 + i) for i in range(60)])
    other = write_lines(tmp_path / "other.jsonl", [document(1050 + i) for i in range(40)])
    split = open_data(main, plain, seed=0, certify=other, limits=(999, 999, 999))
    seen = [words_of(part, plain.tokenizer()) for part in parts_of(split)]
    assert max(map(int, seen[0] | seen[1])) < 1050 <= min(map(int, seen[2])), "the ten common documents stay in certify alone"
    assert [split.record["parts"][p]["documents"] for p in ("calibrate", "search", "certify")] == [34, 16, 40]
    with pytest.raises(UserError, match=r"0 documents of its own, 60 more are in .*main"):
        open_data(main, plain, seed=0, certify=main)


def test_rows_without_opening_token_run_on(tmp_path: Path, plain: models.Source) -> None:
    data = write_lines(tmp_path / "d.jsonl", [document(1000 + i) for i in range(40)])
    split = open_data(data, plain, seed=0, limits=(999, 999, 999))
    flat = split.calibrate.inputs.reshape(-1).tolist()
    # </s> (1) between documents, none lost, and nothing before the first
    assert flat[0] > 1 and flat.count(1) >= 18 and 0 not in flat
    pieces = plain.tokenizer().decode(flat).split("</s>")
    assert set(pieces[:-1]) <= {document(1000 + i) for i in range(40)}


def test_rows_with_opening_token(tmp_path: Path, opened: models.Source) -> None:
    data = write_lines(tmp_path / "d.jsonl", [document(1000 + i) for i in range(40)])
    split = open_data(data, opened, seed=0, length=32)
    rows = split.calibrate.inputs
    assert bool((rows[:, 0] == 0).all()) and not bool((rows[:, 1] == 0).any()) and 1 not in rows
    assert rows.shape[1] == 32 and rows[:, 1:].eq(0).sum() > 10


def test_few_rows_are_spread_over_long_documents(tmp_path: Path, plain: models.Source) -> None:
    texts = Texts(*([" ".join(f"{i}{j:03d}" for j in range(300)) for i in range(k, k + 3)] for k in (1, 4, 7)), {"list": "three"})
    split = open_data(None, plain, seed=0, limits=(6, 3, 3), default=lambda: texts)
    seen = {w[0] for w in words_of(split.calibrate, plain.tokenizer())}
    assert seen == {"1", "2", "3"} and split.calibrate.inputs.shape == (6, 64)
    assert split.record["texts"] == {"list": "three"} and split.record["spec"] == "" and split.certify.documents == 3
    # a document in two lists stays in the later one
    shared = Texts(texts.calibrate + texts.certify[:1], texts.search, texts.certify, {})
    again = open_data(None, plain, seed=0, limits=(99, 99, 99), default=lambda: shared)
    assert again.record["duplicates"] == 1 and again.record["parts"]["calibrate"]["documents"] == 3
    other = write_lines(tmp_path / "other.jsonl", [document(9000 + i) for i in range(30)])
    apart = open_data(None, plain, seed=0, certify=other, default=lambda: texts)
    assert words_of(apart.certify, plain.tokenizer()) <= {str(9000 + i) for i in range(30)}


def test_default_modules_of_this_python(plain: models.Source) -> None:
    from laconic.zoo import corpus

    def default() -> Texts:
        lists = [[text for _, text in corpus.named(name)] for name in ("calibrate", "search", "certify")]
        return Texts(*lists, {name: corpus.record(name) for name in corpus.LISTS})

    split = open_data(None, plain, seed=0, limits=(16, 8, 8), default=default)
    assert split.record["texts"]["certify"]["python"].split()[1] == sys.version.split()[0]
    assert split.certify.documents >= 6, "eight rows come from at least six of the thirteen modules"


def test_chats_take_the_template(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    source = models.open_model(save_model(tmp_path / "model", bos=True, template=template))
    chats = [{"messages": [{"role": "user", "content": document(1000 + i)}, {"role": "assistant", "content": "seven"}]} for i in range(40)]
    rows = open_data(write_lines(tmp_path / "c.jsonl", chats), source, seed=0).calibrate.inputs
    text = source.tokenizer().decode(rows.reshape(-1))
    assert "[user] 1" in text and "[assistant] seven\n" in text
    assert not bool((rows[:, :-1].eq(0) & rows[:, 1:].eq(0)).any()), "the template's own <s> is not added to the tokenizer's"


def test_long_files_are_not_tokenized_to_the_end(tmp_path: Path, plain: models.Source) -> None:
    data = write_lines(tmp_path / "d.jsonl", [document(1000 + i, 100) for i in range(3000)])
    split = open_data(data, plain, seed=0, limits=(2, 2, 2))
    held = split.record["parts"]["calibrate"]
    assert held["documents"] == 1500 and held["rows"] == 2 and held["tokens_read"] < 2000


def bad(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


ENOUGH = "\n\n".join(document(i) for i in range(60)).encode()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: str(folder / "none.txt"), "no such data"),
        (lambda folder: str(folder), "holds no data"),
        (bad("a.csv", ENOUGH), r"must end in \.txt"),
        (bad("a.txt", b"good\nwords\n\xff\xfe\n"), "a.txt is not UTF-8 after line"),
        (bad("a.txt", ENOUGH.decode().encode("utf-16")), "not UTF-8"),
        (bad("a.txt", b""), "holds no text"),
        (bad("a.txt", b" \n\n\t\n"), "holds no text"),
        (bad("a.jsonl", b'""\n"  "\n'), "holds no text"),
        (bad("a.txt", b"one block\nof two lines\n"), "1 documents of its own, too few to split in 3 parts"),
        (bad("a.txt", b"a\n\nb\n\nc\n\nd"), "part of .* tokens, too few for one row of 64: give at least .* times as much"),
        (bad("a.jsonl", b'"fine"\nnot json\n'), "line 2 of a.jsonl is not JSON"),
        (bad("a.jsonl", b'{"txt": "x"}\n'), "line 1 of a.jsonl holds a JSON dict with 'txt'"),
        (bad("a.jsonl", b"[1, 2]\n"), "holds a JSON list"),
        (bad("a.jsonl", b'"\\ud800"\n'), "half a surrogate pair"),
        (bad("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n'), "no chat template"),
        (bad("a.txt.gz", ENOUGH), "not a whole gzip file"),
        (bad("a.txt.gz", gzip.compress(ENOUGH)[:-40]), "not a whole gzip file"),
        (lambda folder: "package.module:function", "this model reads text"),
        (lambda folder: None, "--data is missing"),
    ],
)
def test_bad_text(make: Callable[[Path], str | None], says: str, tmp_path: Path, plain: models.Source) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_data(make(tmp_path), plain, seed=0)
    assert "\n" not in str(caught.value)


def test_bad_lengths(tmp_path: Path, plain: models.Source) -> None:
    data = bad("a.txt", ENOUGH)(tmp_path)
    with pytest.raises(UserError, match="longer than the model's context of 64"):
        open_data(data, plain, seed=0, length=65)
    with pytest.raises(UserError, match="at least 2"):
        open_data(data, plain, seed=0, length=1)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    data = bad("a.txt", ENOUGH)(tmp_path)
    with pytest.raises(UserError, match="vocabulary"):
        open_data(data, models.open_model(save_model(tmp_path / "model", vocabulary=300)), seed=0)


# ---- functions

MODULE = """
import torch
G = torch.Generator().manual_seed(0)
X = torch.rand(100, 3, 4, generator=G)
Y = torch.arange(100) % 10
def whole(): return X, Y
def batches():
    for i in range(0, 100, 30): yield X[i:i+30], Y[i:i+30]
def pairs():
    for x, y in zip(X, Y): yield x.numpy(), int(y)
def repeated(): return torch.cat([X, X]), torch.cat([Y, Y])
def late(): return X[:20] , Y[:20]
def scored(): return X, X.sum((1, 2))
scored.metric = "kl"
def odd(): return X, Y
odd.metric = "accurracy"
def scores(): return X, X.sum((1, 2))
def broken(): return X / 0, Y
def nothing(): return []
def lonely(): yield X
def uneven(): yield X, Y[:3]
def ragged():
    yield X, Y
    yield X[:, :1], Y
def raises(): raise KeyError("cifar")
def number(): return 3
def few(): return X[:2], Y[:2]
value = 4
"""


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.Source:
    (tmp_path / "house_of_pairs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("house_of_pairs", None)
    return models.open_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))


def test_pairs_in_any_form(classifier: models.Source) -> None:
    split = open_data("house_of_pairs:whole", classifier, seed=0)
    assert split.metric == "accuracy" and [p.inputs.shape[0] for p in parts_of(split)] == [50, 25, 25]
    for part in parts_of(split):
        assert part.targets is not None and part.targets.dtype == torch.int64 and part.inputs.shape[1:] == (3, 4)
    module = sys.modules["house_of_pairs"]
    for x, y in zip(split.certify.inputs, split.certify.targets, strict=True):
        assert int(module.Y[[torch.equal(x, one) for one in module.X].index(True)]) == int(y), "targets stay with their inputs"
    for other in ("batches", "pairs", "repeated"):
        assert same(split, open_data(f"house_of_pairs:{other}", classifier, seed=0))
    rows = torch.cat([p.inputs for p in parts_of(split)]).reshape(100, -1)
    assert len(torch.unique(rows, dim=0)) == 100
    assert [p.inputs.shape[0] for p in parts_of(open_data("house_of_pairs:whole", classifier, seed=0, limits=(8, 4, 6)))] == [8, 4, 6]
    assert open_data("house_of_pairs:scored", classifier, seed=0).metric == "kl"
    apart = open_data("house_of_pairs:whole", classifier, seed=0, certify="house_of_pairs:late")
    assert [p.inputs.shape[0] for p in parts_of(apart)] == [54, 26, 20] and apart.record["duplicates"] == 20


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (None, "needs data"),
        ("house_of_pairs.py", "this model reads no text"),
        ("nowhere.txt", "no package.module:function"),
        ("house_of_cards:whole", "cannot be imported"),
        ("house_of_pairs:whol", "did you mean 'whole'"),
        ("house_of_pairs:value", "no function 'value'"),
        ("house_of_pairs:odd", "did you mean 'accuracy'"),
        ("house_of_pairs:scores", "one class number a sample"),
        ("house_of_pairs:broken", "not finite"),
        ("house_of_pairs:nothing", "yields nothing"),
        ("house_of_pairs:lonely", "not a pair"),
        ("house_of_pairs:uneven", "first sizes agree"),
        ("house_of_pairs:ragged", "one shape"),
        ("house_of_pairs:raises", "raised KeyError"),
        ("house_of_pairs:number", "returns int"),
        ("house_of_pairs:few", "2 samples of its own, too few"),
    ],
)
def test_bad_pairs(spec: str | None, says: str, classifier: models.Source) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_data(spec, classifier, seed=0)
    assert "\n" not in str(caught.value)
