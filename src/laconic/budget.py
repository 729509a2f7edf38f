"""Budget words: `size=25%`, `size=120MB`, `size=3MiB`, `bits=4.25`. Several hold together; each becomes bytes of the stored model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from laconic.core.errors import UserError, nearest
from laconic.core.menu import Budget

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LATER = ("latency", "kl", "kv", "perplexity", "accuracy", "flops", "memory", "experts", "seconds")
NOW = ("size", "bits")


class Counted(Protocol):
    """What a budget needs of a model."""

    @property
    def parameters(self) -> int: ...


def _number(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"budget {word!r}: {text!r} is no number; write size=25%, size=120MB or bits=4.25") from None
    if not 0 < value < float("inf"):
        raise UserError(f"budget {word!r}: {text} must be above zero; write size=25%, size=120MB or bits=4.25")
    return value


def bytes_of(word: str, parameters: int) -> int:
    """One budget word in bytes. size=P% is of the model's bf16 bytes (two for each parameter), bits is stored bits over all parameters."""
    match = re.fullmatch(r"\s*([A-Za-z_]+)\s*(<=|=)\s*(\S+)\s*", word)
    if match is None:
        raise UserError(f"budget {word!r} is not understood; write size=25%, size=120MB or bits=4.25")
    name, _, text = match.groups()
    if name in ("recall", "dims"):
        raise UserError(f"budget word {name!r} is for a file of vectors; for a model write size=25%, size=120MB or bits=4.25")
    if name in LATER:
        raise UserError(f"budget word {name!r}: not yet; today's words are size= and bits=")
    if name not in NOW:
        raise UserError(f"unknown budget word {name!r}{nearest(name, NOW)}")
    if name == "bits":
        value = _number(word, text)
        if value > 16:
            raise UserError(f"budget {word!r}: over 16 bits a weight nothing needs compressing; ask for 16 or less")
        return int(value * parameters / 8)
    return _sized(word, text, 2 * parameters)


def _sized(word: str, text: str, whole: int) -> int:
    """A size in bytes: a share of the whole, or a number with a unit."""
    if text.endswith("%"):
        percent = _number(word, text[:-1])
        if percent > 100:
            raise UserError(f"budget {word!r}: over 100 % there is nothing to do; ask for 100 % or less")
        return int(percent / 100 * whole)
    unit = re.fullmatch(r"([-+0-9.eE]+)([A-Za-z]+)", text)
    if unit is None or unit.group(2).upper() not in UNITS:
        raise UserError(f"budget {word!r}: give a percentage or a unit, as in size=25%, size=120MB (10^6) or size=120MiB (2^20)")
    return int(_number(word, unit.group(1)) * UNITS[unit.group(2).upper()])


def parse_budget(words: Sequence[str], source: Counted, *, needed: bool = True) -> Budget:
    """All words together: the least of their bytes. The same word twice with different values is refused, and no word where one is
    needed."""
    if not words and not needed:
        return Budget()
    if not words:
        raise UserError("no budget given; add --budget size=25% (or size=120MB, or bits=4.25)")
    seen: dict[str, str] = {}
    for word in words:
        name = re.split(r"<=|=", word)[0].strip()
        if name in seen and seen[name] != word:
            raise UserError(f"budgets {seen[name]!r} and {word!r} contradict each other; keep one")
        seen[name] = word
    return Budget(bytes=min(bytes_of(word, source.parameters) for word in words))


class Floor(NamedTuple):
    """What vectors must keep, and what they may take: share of nearest neighbours found again, bytes, numbers of each."""

    recall: float | None = None
    bytes: int | None = None
    dims: int | None = None


def vector_budget(words: Sequence[str], whole: int) -> Floor:
    """The words for a file of vectors whose numbers take `whole` bytes: recall=0.95 (a floor), size=10%, dims=64; several all hold."""
    names = ("recall", "size", "dims")
    found: dict[str, float] = {}
    for word in words:
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|=)\s*(\S+)\s*", word)
        name, sign = (match.group(1), match.group(2)) if match else (word, "=")
        if match is None or name not in names or sign == ("<=" if name == "recall" else ">="):
            raise UserError(f"budget {word!r} is not understood{nearest(name, names)}; write recall=0.95, size=10% or dims=64")
        text = match.group(3)
        if name == "recall":
            value = _number(word, text)
            if value > 1:
                raise UserError(f"budget {word!r}: recall is a share of neighbours, at most 1; write recall=0.95")
        elif name == "dims":
            if not re.fullmatch(r"[1-9]\d*", text):
                raise UserError(f"budget {word!r}: {text!r} is no count of numbers; write a whole one above zero")
            value = int(text)
        else:
            value = _sized(word, text, whole)
        if found.setdefault(name, value) != value:
            raise UserError(f"budget {word!r} contradicts another {name}=; keep one")
    size, dims = found.get("size"), found.get("dims")
    return Floor(found.get("recall"), None if size is None else int(size), None if dims is None else int(dims))


def pool_budget(words: Sequence[str], whole: int) -> Budget:
    """The words for a pool of documents of `whole` bytes: examples=1000, size=2MB, size=10%; several all hold."""
    if not words:
        raise UserError("no budget given; add --budget examples=1000 (or size=2MB, or size=10%)")
    found: dict[str, int] = {}
    for word in words:
        match = re.fullmatch(r"\s*(\w+)\s*(?:<=|=)\s*(\S+)\s*", word)
        name = match.group(1) if match else word
        if match is None or name not in ("examples", "size"):
            raise UserError(
                f"budget {word!r} is not understood{nearest(name, ('examples', 'size'))}; write examples=1000, size=2MB or size=10%"
            )
        if name == "examples" and not re.fullmatch(r"[1-9]\d*", match.group(2)):
            raise UserError(f"budget {word!r}: {match.group(2)!r} is no count of documents; write a whole number above zero")
        value = int(match.group(2)) if name == "examples" else _sized(word, match.group(2), whole)
        if found.setdefault(name, value) != value:
            raise UserError(f"budget {word!r} contradicts another {name}=; keep one")
    return Budget(bytes=found.get("size"), examples=found.get("examples"))
