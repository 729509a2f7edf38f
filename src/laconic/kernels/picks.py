"""Which of two ways a product with codes goes: by a kernel that reads them as they are stored, or by torch over rows made dense, some at a
time.

The kernel is quicker for few rows of x, torch for many; where they meet depends on the processor, the form, the size and the threads. It
is measured once on a machine (`laconic.picking`) and kept in a file; where it was not, numbers found on other processors are taken.

LACONIC_PICKS names the file, or is `shipped`: nothing is measured, nothing read; else it is laconic/picks.json in the user's cache."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from laconic.kernels.native import native

# no number of rows is too many
EVERY = 1 << 40
# weights from which on a matrix is a large one: its dense rows do not stay near the processor
LARGE = 1 << 21
FORMAT = 1


class Product(NamedTuple):
    """Products that go one way. form: `grouped` or `lookup`; bits: of a code; narrow: x is bf16; large: the matrix is."""

    form: str
    bits: int
    narrow: bool
    large: bool

    @property
    def name(self) -> str:
        """As the file has it."""
        return "/".join([self.form, str(self.bits), "bf16" if self.narrow else "fp32", "large" if self.large else "small"])


class Pick(NamedTuple):
    """A product's way: by the kernel up to `rows` rows of x. ms: of the kernel and of dense rows by rows tried, where it was measured."""

    product: Product
    rows: int
    ms: Mapping[int, tuple[float, float]] = {}

    def words(self) -> dict[str, Any]:
        """As the file has it; no `rows`: all of them."""
        return {"rows": None if self.rows == EVERY else self.rows, "ms": {str(rows): list(ms) for rows, ms in self.ms.items()}}


PRODUCTS = tuple(
    Product(form, bits, narrow, large)
    for form, widths in (("grouped", (2, 3, 4, 8)), ("lookup", (4, 8)))
    for bits in widths
    for narrow in (True, False)
    for large in (False, True)
)

_forced: int | None = None


@contextmanager
def forced(rows: int) -> Iterator[None]:
    """Inside, kernels take so many rows, whatever is known."""
    global _forced
    before, _forced = _forced, rows
    try:
        yield
    finally:
        _forced = before


def rows_of(form: str, bits: int, dtype: torch.dtype, weights: int, shipped: int) -> int:
    """Rows of x up to which a product with a matrix of so many weights is quicker by the kernel on this machine; shipped: what is taken
    where that was not measured."""
    if _forced is not None:
        return _forced
    known = _known(torch.get_num_threads())
    if not known:
        return shipped
    return known.get((form, bits, dtype == torch.bfloat16, weights >= LARGE), shipped)


# ---- the file


def file() -> Path | None:
    """Where picks are kept; None where none are wanted."""
    if (named := os.environ.get("LACONIC_PICKS", "")) == "shipped":
        return None
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "laconic" / "picks.json"


def machine(threads: int) -> str:
    """What picks are good for: processor, instructions, threads, and what computes."""
    there = native()
    level = there.level if there else "reference"
    return " | ".join([_processor(), level, f"{threads} threads", f"laconic {version('laconic')}", f"torch {torch.__version__}"])


@lru_cache(maxsize=1)
def _processor() -> str:
    # not platform.processor(): it starts a child, which for a moment counts as large as this process
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kept(threads: int | None = None) -> list[Pick]:
    """What was measured on this machine, with so many threads (None: torch's); empty where nothing was."""
    threads = torch.get_num_threads() if threads is None else threads
    where = file()
    try:
        stored = json.loads(where.read_text(encoding="utf-8")) if where is not None else {}
        mine = stored["machines"][machine(threads)] if stored.get("format") == FORMAT else {}
        by_name = {product.name: product for product in PRODUCTS}
        return [
            Pick(by_name[name], EVERY if one["rows"] is None else int(one["rows"]), {int(r): (a, b) for r, (a, b) in one["ms"].items()})
            for name, one in mine.items()
            if name in by_name
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # a file that cannot be read is one that is not there
        return []


@lru_cache(maxsize=16)
def _known(threads: int) -> dict[tuple[str, int, bool, bool], int]:
    found = {}
    for pick in kept(threads):
        form, bits, narrow, large = pick.product
        found[form, bits, narrow, large] = pick.rows
    return found


def forget() -> None:
    """The file is read again."""
    _known.cache_clear()


def keep(picks: list[Pick]) -> Path | None:
    """Write what was measured beside what is known of other machines; the file, or None where it cannot be written."""
    where = file()
    if where is None:
        return None
    try:
        stored = json.loads(where.read_text(encoding="utf-8"))
        stored = stored if stored["format"] == FORMAT and isinstance(stored["machines"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        stored = {}
    machines = {**stored.get("machines", {}), machine(torch.get_num_threads()): {pick.product.name: pick.words() for pick in picks}}
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where.parent, suffix=".tmp", delete=False, encoding="utf-8") as out:
            json.dump({"format": FORMAT, "machines": machines}, out, indent=1)
        Path(out.name).replace(where)
    except OSError:
        return None
    finally:
        forget()
    return where
