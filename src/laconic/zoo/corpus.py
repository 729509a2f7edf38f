"""Texts by name: three held-out lists of standard-library modules, and the corpus that `nano` is trained on.

The lists hold file names, not text: each interpreter reads its own standard library, so a certificate records
the Python version and the sha256 of every text (`record`). Every file named exists in CPython 3.9 to 3.14,
outside the folders that slim images leave out. Training never sees them: `training` drops the files themselves,
exact duplicates, and every file that shares over 5 % of its 50-character windows with them.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from laconic.core.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

CALIBRATE: tuple[str, ...] = (
    "configparser.py",
    "doctest.py",
    "fnmatch.py",
    "functools.py",
    "http/cookiejar.py",
    "ipaddress.py",
    "json/decoder.py",
    "multiprocessing/pool.py",
    "pickle.py",
    "random.py",
    "subprocess.py",
    "unittest/case.py",
)
SEARCH: tuple[str, ...] = (
    "bisect.py",
    "copy.py",
    "dataclasses.py",
    "difflib.py",
    "email/header.py",
    "gettext.py",
    "optparse.py",
    "queue.py",
    "shutil.py",
    "tempfile.py",
    "threading.py",
    "urllib/parse.py",
    "xmlrpc/server.py",
)
CERTIFY: tuple[str, ...] = (
    "argparse.py",
    "asyncio/base_events.py",
    "calendar.py",
    "concurrent/futures/process.py",
    "csv.py",
    "email/feedparser.py",
    "heapq.py",
    "http/client.py",
    "shlex.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "xml/etree/ElementPath.py",
)
LISTS: dict[str, tuple[str, ...]] = {"calibrate": CALIBRATE, "search": SEARCH, "certify": CERTIFY}

WINDOW = 50
SHARED = 0.05
PACKAGES: tuple[str, ...] = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "jinja2",
    "highspy",
    "psutil",
)
# tables and generated text, which teach a language model little
_TABLES = re.compile(r"^(encodings|pydoc_data)/|^_sysconfigdata|^html/entities|_parsetab|/(lextab|yacctab)")
# deliberately broken sources that only exist to test a tokenizer
_BROKEN = re.compile(r"(^|/)(bad|lib2to3_tests|badsyntax_\w*|tokenizedata|cjkencodings)(/|\.py$)|/tests/data/")


@dataclass(frozen=True)
class Source:
    """One training file: the package it came from, its name there, and its text."""

    package: str
    name: str
    text: str


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def named(name: str) -> list[tuple[str, str]]:
    """Return (module file name, text) for each file of the list `calibrate`, `search` or `certify`.

    Raises UserError for an unknown list, and one that names every missing file and the cure.
    """
    if name not in LISTS:
        raise UserError(f"no list of texts is called {name!r}{nearest(name, LISTS)}")
    root = _stdlib()
    missing = [f for f in LISTS[name] if not (root / f).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(LISTS[name])} files of list {name!r} are not in {root}: {', '.join(missing)}; "
            "use a full CPython 3.9 to 3.14 (on Debian: apt-get install libpython3-stdlib) or bring your own text"
        )
    return [(f, (root / f).read_text(encoding="utf-8")) for f in LISTS[name]]


def record(name: str) -> dict[str, object]:
    """Return what a certificate states of a list: Python version, and characters and sha256 of each text."""
    texts = named(name)
    return {
        "list": name,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "files": {f: {"characters": len(t), "sha256": hashlib.sha256(t.encode()).hexdigest()} for f, t in texts},
    }


# an odd base has an inverse modulo 2**64, so that prefix sums give every window's hash without a loop
_BASE = 0x9E3779B97F4A7C15
_BACK = pow(_BASE, -1, 1 << 64)


def _powers(base: int, n: int) -> np.ndarray:
    import numpy as np

    steps = np.full(n, base, dtype=np.uint64)
    steps[:1] = 1
    return np.cumprod(steps)


def windows(text: str, width: int = WINDOW) -> np.ndarray:
    """Return a 64-bit hash of each `width`-character window of text, whitespace kept; uint64 [characters - width + 1]."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    n = len(codes)
    if n < width:
        return np.empty(0, dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes + np.uint64(0x517CC1)) * _powers(_BASE, n))])
    h = (sums[width:] - sums[:-width]) * _powers(_BACK, n - width + 1)
    # the low bits of a product are weak: fold the high half in before they index a table
    return (h ^ (h >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)


class Overlap:
    """Share of a text's windows that occur in the held-out texts."""

    def __init__(self, held_out: list[str]) -> None:
        import numpy as np

        self.hashes = np.unique(np.concatenate([windows(t) for t in held_out]))
        # nearly every window is rejected by one look into this table, the rest by a sorted search
        self._seen = np.zeros(1 << 24, dtype=bool)
        self._seen[self.hashes >> np.uint64(40)] = True

    def share(self, text: str) -> float:
        """Return the share, 0 to 1, of text's windows that are held out (0 for a text shorter than a window)."""
        import numpy as np

        w = windows(text)
        if not len(w):
            return 0.0
        maybe = w[self._seen[w >> np.uint64(40)]]
        at = np.minimum(np.searchsorted(self.hashes, maybe), len(self.hashes) - 1)
        return float((self.hashes[at] == maybe).sum()) / len(w)


@lru_cache(maxsize=1)
def held_out() -> Overlap:
    """Return the filter over the texts of all three lists."""
    return Overlap([t for name in LISTS for _, t in named(name)])


def _closure(seeds: tuple[str, ...]) -> list[str]:
    """Distributions that installing `seeds` brings here, by their metadata, sorted."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    todo = list(seeds)
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            wants = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found[key] = name
        for line in wants:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return sorted(found)


def _candidates() -> list[tuple[str, str, Path]]:
    root = _stdlib()
    out = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")) or "/site-packages/" in name:
            continue
        top = name.split("/")[0]
        package = "stdlib tests" if top == "test" or "/test/" in name or "/tests/" in name or "idle_test" in name else "stdlib"
        out.append((package, name, path))
    for package in _closure(PACKAGES):
        for file in metadata.files(package) or []:
            if file.suffix == ".py" and ".." not in file.parts:
                out.append((package, file.as_posix(), Path(str(file.locate()))))
    return sorted(out, key=lambda c: (c[0], c[1]))


def training(cap: int = 12_000_000, longest: int = 400_000) -> tuple[list[Source], dict[str, int]]:
    """Return the training files, in a fixed order, and counts of what was left out.

    Sources: the standard library with its tests, and the packages that the core install brings with theirs.
    Left out: the three lists, exact duplicates, files over SHARED of whose windows are held out, tables, sources
    that do not parse as text, files over `longest` characters. A package over `cap` characters keeps a sample
    of its files drawn by the hash of their names, so that near-copied files do not dominate.
    """
    held = {f for files in LISTS.values() for f in files}
    overlap = held_out()
    counts = dict.fromkeys(("files", "held out", "duplicate", "overlap", "overlap characters", "table or unreadable", "over the cap"), 0)
    seen: set[bytes] = set()
    packages: dict[str, list[Source]] = {}
    for package, name, path in _candidates():
        counts["files"] += 1
        if package == "stdlib" and name in held:
            counts["held out"] += 1
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        table = package.startswith("stdlib") and (_TABLES.search(name) or _BROKEN.search(name))
        if table or not 200 <= len(text) <= longest or len(text) > 120 * text.count("\n"):
            counts["table or unreadable"] += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            counts["duplicate"] += 1
            continue
        seen.add(digest)
        if overlap.share(text) > SHARED:
            counts["overlap"] += 1
            counts["overlap characters"] += len(text)
            continue
        packages.setdefault(package, []).append(Source(package, name, text))
    kept = []
    for package in sorted(packages):
        total = 0
        for source in sorted(packages[package], key=lambda s: hashlib.sha256(s.name.encode()).digest()):
            if total + len(source.text) > cap:
                counts["over the cap"] += 1
                continue
            total += len(source.text)
            kept.append(source)
    return kept, counts
