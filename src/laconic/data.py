"""The user's data: read, split by documents into three parts that never meet, tokenized and packed."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from laconic.core.errors import UserError, nearest

if TYPE_CHECKING:
    from laconic.models import Source

PARTS = ("calibrate", "search", "certify")
SHARES = (0.5, 0.25, 0.25)
ROWS = (128, 32, 64)
# of (inputs, target) data: one sample is far less than a row of text
SAMPLES = (1024, 1024, 4096)
_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_TEXT_CURE = "pass a .txt or .jsonl file, either may end in .gz, or a folder of them"
_PAIR_CURE = "pass --data package.module:function that yields (inputs, target)"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_LINE = 'a line is one JSON string, {"text": ...} or {"messages": [...]}'


class Samples(NamedTuple):
    """One part. Text: inputs int64 (count, length) packed tokens, targets None. Otherwise inputs (count, ...) and targets (count, ...),
    length 1. documents: how many of them have tokens here. sha256: of the bytes of inputs and targets."""

    inputs: Tensor
    targets: Tensor | None
    length: int
    documents: int
    sha256: str


class Split(NamedTuple):
    """The three parts, what a certificate states of them, and how a model is judged on them: by "kl" (text) or by "accuracy".
    given: further inputs of a model that takes several, the same for every sample."""

    calibrate: Samples
    search: Samples
    certify: Samples
    record: dict[str, Any]
    metric: str
    given: Mapping[str, Tensor] = MappingProxyType({})


class Texts(NamedTuple):
    """Documents that are split already, with what a certificate states of them."""

    calibrate: list[str]
    search: list[str]
    certify: list[str]
    record: dict[str, Any]


def open_data(
    spec: str | None,
    source: Source,
    *,
    seed: int,
    certify: str | None = None,
    length: int | None = None,
    limits: tuple[int, int, int] | None = None,
    default: Callable[[], Texts] | None = None,
) -> Split:
    """Read `spec` for the model `source`: a text file or a folder of them, a `package.module:function`, or None for the default texts.

    certify names separate data for the third part; length is tokens a row (min(512, context) by default); limits are the most rows
    (128, 32, 64) or samples (1024, 1024, 4096) of each part. The same arguments give the same bytes. Raises UserError."""
    if source.task != "text":
        if spec is None:
            raise UserError(f"a model that is no language model needs data: {_PAIR_CURE}")
        return _open_pairs(spec, certify, seed=seed, limits=limits or SAMPLES)
    width = _row_length(length, source.context)
    for name in (spec, certify):
        if name is not None and _is_function(name):
            raise UserError(f"{name} is a function, but this model reads text: {_TEXT_CURE}")
    if spec is None and default is None:
        raise UserError(f"there is no text to calibrate on, --data is missing: {_TEXT_CURE}")
    return _open_text(spec, certify, source, default, seed=seed, length=width, limits=limits or ROWS)


def _row_length(length: int | None, context: int) -> int:
    if length is None:
        return min(512, context) if context else 512
    if length < 2:
        raise UserError(f"a row of {length} tokens predicts nothing: use a length of at least 2")
    if context and length > context:
        raise UserError(f"a row of {length} tokens is longer than the model's context of {context}: use a length of at most {context}")
    return length


# ---- order and split


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _in_order(digests: Iterable[bytes], seed: int) -> list[bytes]:
    # the order hangs on seed and content alone: renaming or reordering files moves nothing
    salt = str(seed).encode() + b":"
    return sorted(digests, key=lambda d: hashlib.sha256(salt + d).digest())


def _cut(items: Sequence[bytes], shares: Sequence[float]) -> list[Sequence[bytes]]:
    """Consecutive parts by share, each but the first rounded down yet never empty; the first takes what is left."""
    whole = sum(shares)
    counts = [max(1, int(len(items) * share / whole)) for share in shares[1:]]
    ends = list(itertools.accumulate([len(items) - sum(counts), *counts], initial=0))
    return [items[a:b] for a, b in itertools.pairwise(ends)]


def _cut_parts(
    own: Iterable[bytes], other: Iterable[bytes] | None, spec: str, certify: str | None, *, seed: int, unit: str
) -> tuple[list[Sequence[bytes]], int]:
    """Digests of the three parts, and how many of `own` were left out because `other` (a separate certify) has them as well."""
    left = list(own)
    apart = set() if other is None else set(other)
    kept = [d for d in left if d not in apart]
    parts = 3 if other is None else 2
    if len(kept) < parts:
        common = f", {len(left) - len(kept)} more are in {certify} as well" if len(left) > len(kept) else ""
        cure = f"give more {unit}" + ("" if unit == "samples" else " (lines of .jsonl, blocks between blank lines of .txt)")
        raise UserError(f"{spec} has {len(kept)} {unit} of its own{common}, too few to split in {parts} parts: {cure}")
    cut = _cut(_in_order(kept, seed), SHARES[:parts])
    if other is not None:
        cut.append(_in_order(apart, seed))
    return cut, len(left) - len(kept)


# ---- text


def _files(spec: str) -> list[tuple[str, Path]]:
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"no such data: {spec}; {_TEXT_CURE}")
    if path.is_dir():
        found = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(_SUFFIXES))
        if not found:
            raise UserError(f"the folder {spec} holds no data: put {', '.join(_SUFFIXES)} files there")
        return found
    if not path.name.lower().endswith(_SUFFIXES):
        raise UserError(f"{spec} is not text that can be read by its name: it must end in {', '.join(_SUFFIXES)}")
    return [(path.name, path)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _lines(name: str, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as raw:
            stored: Any = gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw
            for number, line in enumerate(io.TextIOWrapper(stored, encoding="utf-8-sig"), 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 after line {number} ({error.reason}): convert it, for instance with iconv") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a whole gzip file ({error}): copy or compress it anew") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error}): check the file and its permissions") from error


def _blocks(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    block: list[str] = []
    for _, line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip()
            block = []
    if block:
        yield "".join(block).rstrip()


def _line_text(line: str, where: str, render: Callable[[Any, str], str]) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): {_LINE}") from error
    if isinstance(value, str):
        text = value
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        text = value["text"]
    elif isinstance(value, dict) and isinstance(value.get("messages"), list):
        text = render(value["messages"], where)
    else:
        keys = f" with {', '.join(map(repr, value)) or 'no keys'}" if isinstance(value, dict) else ""
        raise UserError(f"{where} holds a JSON {type(value).__name__}{keys}: {_LINE}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a surrogate pair, which is no text: write the character itself or drop the line") from error
    return text


def _documents(files: Sequence[tuple[str, Path]], render: Callable[[Any, str], str]) -> Iterator[str]:
    """All documents that are not blank, one after another; never more than one in memory."""
    for name, path in files:
        lines = _lines(name, path)
        if name.lower().removesuffix(".gz").endswith(".txt"):
            yield from _blocks(lines)
        else:
            for number, line in lines:
                if line.strip() and (text := _line_text(line, f"line {number} of {name}", render)).strip():
                    yield text


def documents(spec: str) -> Iterator[str]:
    """All plain documents of a text file or a folder of them that are not blank, one after another; chats need a model's template."""

    def render(_: Any, where: str) -> str:
        raise UserError(f'{where} is a chat, which only a model\'s template makes text of: give plain texts, {{"text": ...}} a line')

    return _documents(_files(spec), render)


def _identity(text: str) -> bytes:
    return _digest(text.strip().encode())


class _Dialect(NamedTuple):
    """How a tokenizer frames a text: what it puts before and after, and what is put between texts where it puts nothing."""

    tokenizer: Any
    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...]
    first: tuple[int, ...]


def _dialect(tokenizer: Any) -> _Dialect:
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            before, after = tuple(full[:i]), tuple(full[i + len(bare) :])
            break
    if before or after:
        return _Dialect(tokenizer, before, after, (), ())
    marks = [i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None]
    between = tuple(marks[:1])
    # where one token both ends and begins texts, the first text begins with it as well
    first = between if tokenizer.bos_token_id is not None and between == (tokenizer.bos_token_id,) else ()
    return _Dialect(tokenizer, (), (), between, first)


def _renderer(tokenizer: Any, spec: str) -> Callable[[Any, str], str]:
    lead = tokenizer.bos_token or ""
    adds = bool(lead) and _dialect(tokenizer).before[:1] == (tokenizer.bos_token_id,)

    def render(messages: Any, where: str) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f'{where} is a chat, but the model\'s tokenizer has no chat template: give plain texts, {{"text": ...}} a line')
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise whatever they like
            raise UserError(f"{where} does not fit the model's chat template ({error}): use the roles that it knows") from error
        # the token that opens a text is added for every document later
        return text.removeprefix(lead) if adds else text

    return render


class _Packed(NamedTuple):
    """rows (count, length) in order of the documents; spans (count, 2) the first and the last document in each row; tokens read in all."""

    rows: Tensor
    spans: Tensor
    tokens: int


def _pack(texts: Iterable[str], dialect: _Dialect, length: int) -> _Packed:
    """Joins and cuts. A row begins with what the tokenizer puts before a text; the end that fills no row is dropped."""
    stream: list[int] = []
    owner: list[int] = []
    count = 0
    todo = iter(texts)
    while batch := list(itertools.islice(todo, 256)):
        for ids in dialect.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            lead = dialect.before or (dialect.between if stream else dialect.first)
            framed = [*lead, *ids, *dialect.after]
            stream.extend(framed)
            owner.extend([count] * len(framed))
            count += 1
    before = dialect.before
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    at, step = 0, length - len(before)
    while True:
        if before and tuple(stream[at : at + len(before)]) == before:
            at += len(before)
        if step < 1 or at + step > len(stream):
            break
        rows.append([*before, *stream[at : at + step]])
        spans.append((owner[at], owner[at + step - 1]))
        at += step
    shaped = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)
    return _Packed(shaped, torch.tensor(spans, dtype=torch.int64).reshape(len(rows), 2), len(stream))


def _thin(packed: _Packed, limit: int) -> _Packed:
    """At most `limit` rows, evenly spaced, so that long documents at the front do not crowd out the rest."""
    n = packed.rows.shape[0]
    if n <= limit:
        return packed
    index = torch.arange(limit) * n // limit
    return _Packed(packed.rows[index], packed.spans[index], packed.tokens)


class _Pool(NamedTuple):
    """The documents of one spec by identity, with their sizes in characters; read again when their text is wanted."""

    spec: str
    files: list[tuple[str, Path]]
    hashes: dict[str, str]
    sizes: dict[bytes, int]
    seen: int
    render: Callable[[Any, str], str]

    def texts(self, wanted: Sequence[bytes]) -> Iterator[str]:
        """The texts of the wanted documents, in that order."""
        among = set(wanted)
        found: dict[bytes, str] = {}
        for text in _documents(self.files, self.render):
            digest = _identity(text)
            if digest in among:
                found.setdefault(digest, text)
        if missing := len(among - found.keys()):
            raise UserError(f"{self.spec} changed while it was read, {missing} documents are gone: run again once nothing writes to it")
        return iter([found[d] for d in wanted])


def _pool(spec: str, tokenizer: Any) -> _Pool:
    files = _files(spec)
    render = _renderer(tokenizer, spec)
    sizes: dict[bytes, int] = {}
    seen = 0
    for text in _documents(files, render):
        seen += 1
        sizes.setdefault(_identity(text), len(text))
    if not sizes:
        raise UserError(f"{spec} holds no text: pass a file with documents in it")
    return _Pool(spec, files, {name: _sha256(path) for name, path in files}, sizes, seen, render)


def _pack_some(pool: _Pool, chosen: Sequence[bytes], dialect: _Dialect, length: int, limit: int) -> _Packed:
    """The first documents that fill `limit` rows about twice over, or all; the rest is not tokenized."""
    goal = 8 * limit * length
    while True:
        have = list(itertools.accumulate(pool.sizes[d] for d in chosen))
        count = next((i + 1 for i, total in enumerate(have) if total >= goal), len(chosen))
        packed = _pack(pool.texts(chosen[:count]), dialect, length)
        if packed.rows.shape[0] >= limit or count == len(chosen):
            return packed
        goal *= 4


def _text_samples(packed: _Packed, limit: int, length: int, part: str, name: str, vocabulary: int | None) -> Samples:
    if packed.rows.shape[0] == 0:
        times = max(2, -(-length // max(1, packed.tokens)) + 1)
        few = f"the {part} part of {name} has {packed.tokens} tokens, too few for one row of {length}"
        raise UserError(f"{few}: give at least {times} times as much text")
    thin = _thin(packed, limit)
    top = int(thin.rows.max())
    if vocabulary is not None and top >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {top}, but the vocabulary ends at {vocabulary - 1}: use the tokenizer that belongs to the model"
        )
    documents = {d for low, high in thin.spans.tolist() for d in range(low, high + 1)}
    return Samples(thin.rows, None, length, len(documents), _tensor_hash(thin.rows))


def _vocabulary(source: Source) -> int | None:
    config = source.config
    if config is None:
        return None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(inner, "vocab_size", None)
    return int(size) if size else None


def _open_text(
    spec: str | None,
    certify: str | None,
    source: Source,
    default: Callable[[], Texts] | None,
    *,
    seed: int,
    length: int,
    limits: tuple[int, int, int],
) -> Split:
    tokenizer = source.tokenizer()
    dialect = _dialect(tokenizer)
    apart = None if certify is None else _pool(certify, tokenizer)
    record: dict[str, Any] = {"kind": "text", "spec": spec or "", "seed": seed, "length": length}
    names = [spec or "the default texts"] * 2 + [certify or spec or "the default texts"]
    if spec is None:
        assert default is not None
        texts = default()
        record |= {"rule": "three fixed lists", "texts": texts.record}
        given = [texts.calibrate, texts.search, texts.certify if apart is None else []]
        parts = _apart(given, set(apart.sizes) if apart is not None else set())
        available = [len(p) for p in parts]
        duplicates = sum(map(len, given)) - sum(available)
        packed = [_pack(p, dialect, length) for p in parts]
        if apart is not None:
            chosen = _in_order(apart.sizes, seed)
            available[2] = len(chosen)
            packed[2] = _pack_some(apart, chosen, dialect, length, limits[2])
    else:
        pool = _pool(spec, tokenizer)
        cut, common = _cut_parts(pool.sizes, None if apart is None else apart.sizes, spec, certify, seed=seed, unit="documents")
        record |= {"files": pool.hashes, "rule": _rule(apart is not None, "documents")}
        duplicates = pool.seen - len(pool.sizes) + common
        available = [len(p) for p in cut]
        pools = (pool, pool, apart or pool)
        packed = [_pack_some(p, chosen, dialect, length, n) for p, chosen, n in zip(pools, cut, limits, strict=True)]
    if apart is not None:
        record["certify"] = {"spec": certify, "files": apart.hashes}
        duplicates += apart.seen - len(apart.sizes)
    record["duplicates"] = duplicates
    vocabulary = _vocabulary(source)
    samples: list[Samples] = []
    record["parts"] = {}
    for part, name, pack, limit, total in zip(PARTS, names, packed, limits, available, strict=True):
        one = _text_samples(pack, limit, length, part, name, vocabulary)
        samples.append(one)
        record["parts"][part] = {
            "documents": total,
            "documents_used": one.documents,
            "tokens": one.inputs.numel(),
            "tokens_read": pack.tokens,
            "rows": one.inputs.shape[0],
            "sha256": one.sha256,
        }
    return Split(samples[0], samples[1], samples[2], record, "kl")


def _apart(parts: Sequence[Sequence[str]], taken: set[bytes]) -> list[list[str]]:
    """The parts without repeated documents; one that is in several stays in the last of them."""
    seen = set(taken)
    out: list[list[str]] = []
    for part in reversed(parts):
        kept = []
        for text in part:
            digest = _identity(text)
            if text.strip() and digest not in seen:
                seen.add(digest)
                kept.append(text)
        out.append(kept)
    return out[::-1]


def _rule(apart: bool, unit: str) -> str:
    shares = "two thirds calibrate, one third search, certify apart" if apart else "50 % calibrate, 25 % search, 25 % certify"
    return f"{shares}, by {unit} in the order of sha256(seed:document), exact duplicates once"


def _tensor_hash(*tensors: Tensor | None) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            hasher.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            hasher.update(_bytes(tensor))
    return hasher.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---- (inputs, target) from a function


def _is_function(spec: str) -> bool:
    return _FUNCTION.fullmatch(spec) is not None and not Path(spec).exists()


def _function(spec: str) -> Callable[[], Any]:
    if not _is_function(spec):
        if Path(spec).exists():
            raise UserError(f"{spec} is a file or folder, but this model reads no text: {_PAIR_CURE}")
        raise UserError(f"{spec} is no package.module:function: {_PAIR_CURE}")
    module_name, name = spec.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"the module of {spec} cannot be imported ({why}): check its name and that it is on PYTHONPATH") from error
    found = getattr(module, name, None)
    if not callable(found):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"{module_name} has no function {name!r}{nearest(name, public or ['none'])}")
    return found  # type: ignore[no-any-return]


def _tensor(value: Any, spec: str, what: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{spec} yields {what} of type {type(value).__name__}: yield tensors, arrays or numbers") from error


class _Pairs(NamedTuple):
    inputs: Tensor
    targets: Tensor
    metric: str
    digests: dict[bytes, int]
    given: Mapping[str, Tensor]


def _gather(result: Any, spec: str) -> tuple[Tensor, Tensor]:
    """Batches are joined, single pairs are stacked; a bare (inputs, targets) is one batch."""
    items = [result] if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], Tensor) else result
    if not isinstance(items, Iterable) and not hasattr(items, "__getitem__"):
        raise UserError(f"{spec} returns {type(result).__name__}: let it return or yield (inputs, target)")
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserError(f"{spec} yields {type(item).__name__}, not a pair: let it yield (inputs, target)")
        x, y = _tensor(item[0], spec, "inputs"), _tensor(item[1], spec, "a target")
        if y.ndim == 0:
            x, y = x[None], y[None]
        if x.ndim == 0 or x.shape[0] != y.shape[0]:
            shapes = f"inputs {tuple(x.shape)} with target {tuple(y.shape)}"
            raise UserError(f"{spec} yields {shapes}: let the first sizes agree, or yield one sample with one number")
        if inputs and (x.shape[1:] != inputs[0].shape[1:] or y.shape[1:] != targets[0].shape[1:]):
            shapes = f"inputs of {tuple(inputs[0].shape[1:])} and of {tuple(x.shape[1:])}"
            raise UserError(f"{spec} yields {shapes}: let all samples and all targets have one shape")
        inputs.append(x)
        targets.append(y)
    if not inputs or sum(x.shape[0] for x in inputs) == 0:
        raise UserError(f"{spec} yields nothing: let it yield (inputs, target)")
    return torch.cat(inputs), torch.cat(targets)


def _pairs(spec: str) -> _Pairs:
    function = _function(spec)
    try:
        result = function()
        inputs, targets = _gather(result, spec)
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"{spec} raised {type(error).__name__} ({error}): mend the function, it is called without arguments") from error
    metric = str(getattr(function, "metric", "") or getattr(result, "metric", "") or "accuracy")
    if metric not in ("accuracy", "kl"):
        raise UserError(f"the metric {metric!r} of {spec} is unknown{nearest(metric, ('accuracy', 'kl'))}")
    if metric == "accuracy" and (targets.ndim != 1 or targets.is_floating_point() or targets.is_complex()):
        kind = f"targets {targets.dtype} {tuple(targets.shape)}"
        raise UserError(f"{spec} yields {kind}, but accuracy needs one class number a sample: yield those or set its metric to 'kl'")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise UserError(f"{spec} yields inputs that are not finite: drop or mend those samples")
    digests: dict[bytes, int] = {}
    for i in range(inputs.shape[0]):
        digests.setdefault(_digest(_bytes(inputs[i]).tobytes()), i)
    given = getattr(function, "given", {})
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in given.items()):
        raise UserError(f"the attribute `given` of {spec} is no dict of names and tensors: make it one, or remove it")
    return _Pairs(inputs, targets.long() if metric == "accuracy" else targets, metric, digests, dict(given))


def _open_pairs(spec: str, certify: str | None, *, seed: int, limits: tuple[int, int, int]) -> Split:
    own = _pairs(spec)
    apart = None if certify is None else _pairs(certify)
    cut, common = _cut_parts(own.digests, None if apart is None else apart.digests, spec, certify, seed=seed, unit="samples")
    record: dict[str, Any] = {
        "kind": "pairs",
        "spec": spec,
        "seed": seed,
        "length": 1,
        "metric": own.metric,
        "rule": _rule(apart is not None, "samples"),
        "sha256": _tensor_hash(own.inputs, own.targets, *(own.given[name] for name in sorted(own.given))),
        "duplicates": own.inputs.shape[0] - len(own.digests) + common,
        "parts": {},
    }
    if apart is not None:
        if apart.inputs.shape[1:] != own.inputs.shape[1:] or apart.metric != own.metric:
            shapes = f"{tuple(apart.inputs.shape[1:])} and {tuple(own.inputs.shape[1:])}"
            raise UserError(f"{certify} and {spec} yield unlike samples, {shapes}: let them agree in shape and metric")
        record["certify"] = {"spec": certify, "sha256": _tensor_hash(apart.inputs, apart.targets)}
        record["duplicates"] += apart.inputs.shape[0] - len(apart.digests)
    samples: list[Samples] = []
    sources: tuple[_Pairs, ...] = (own, own, apart or own)
    for part, pairs, chosen, limit in zip(PARTS, sources, cut, limits, strict=True):
        index = torch.tensor([pairs.digests[d] for d in chosen[:limit]], dtype=torch.int64)
        x, y = pairs.inputs[index], pairs.targets[index]
        samples.append(Samples(x, y, 1, len(index), _tensor_hash(x, y)))
        record["parts"][part] = {"documents": len(chosen), "documents_used": len(index), "rows": len(index), "sha256": samples[-1].sha256}
    return Split(samples[0], samples[1], samples[2], record, own.metric, own.given)
