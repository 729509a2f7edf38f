"""The catalogue, read from the code: cards, docstrings and roles are taken from the syntax tree, nothing is imported, torch stays out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from laconic.core.errors import UserError, nearest
from laconic.sources import definitions, hash_of_code

HOME = Path(__file__).parent
METHODS = HOME / "methods"
CLAIMS = HOME / "claims"
VERDICTS = HOME / "verdicts"
MODELS = HOME / "zoo" / "models"

# names are stored in recipes and certificates: a moved file leaves its old name here, old -> new
ALIASES: dict[str, str] = {}


@dataclass(frozen=True)
class Reference:
    """The paper of a card, in words only."""

    authors: str
    year: int
    link: str
    section: str = ""

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, {self.link}" + (f", {self.section}" if self.section else "")


@dataclass(frozen=True)
class Entry:
    """One method: its name is its path below `methods`, its role the base class of its public class; `summary` is the first line of the
    docstring, `doc` all of it."""

    name: str
    role: str
    family: str
    catalogue: str
    paper: Reference
    sibling: str
    exceptions: Mapping[str, str]
    summary: str
    doc: str

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """Each recorded claim of the method with its result, empty where none was run in full."""
        return verdicts(self.name)

    def row(self) -> dict[str, Any]:
        """What `laconic list --json` says of the method."""
        return {
            "name": self.name,
            "role": self.role,
            "family": self.family,
            "catalogue": self.catalogue,
            "paper": asdict(self.paper),
            "sibling": self.sibling,
            "verdicts": [{"says": v["says"], "result": v["result"], "scale": v.get("scale", "")} for v in self.verdicts],
            "summary": self.summary,
        }


def files() -> Iterator[tuple[str, Path]]:
    """Name and file of everything at the depth of methods, in order of name."""
    found = (path for path in METHODS.glob("*/*/*.py") if path.stem != "__init__")
    yield from sorted((".".join(path.relative_to(METHODS).with_suffix("").parts), path) for path in found)


# what methods hold tensors in and put into a model: a file's role is another where there is one
HELD = ("Packed", "Part", "Routed")


@lru_cache(maxsize=1)
def roles() -> dict[str, str]:
    """The abstract classes in `core/`, the questions that a method may answer, by their names and those of what is built on them there."""
    found: dict[str, str] = {}
    for path in sorted((HOME / "core").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                own = [node.name] if "ABC" in _bases(node) else [found[base] for base in _bases(node) if base in found]
                found.update(dict.fromkeys([node.name] if own else [], own[0] if own else ""))
    return found


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.attr if isinstance(base, ast.Attribute) else base.id for base in node.bases if isinstance(base, (ast.Attribute, ast.Name))]


def _role(tree: ast.Module) -> str:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    answered = [roles()[base] for node in classes for base in _bases(node) if base in roles()]
    return next((role for role in answered if role not in HELD), answered[0] if answered else "")


def _arguments(call: ast.Call, names: tuple[str, ...]) -> dict[str, ast.expr]:
    found = dict(zip(names, call.args, strict=False))
    found.update({keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})
    return found


def _call(node: ast.expr | None, names: tuple[str, ...]) -> dict[str, ast.expr]:
    if not isinstance(node, ast.Call):
        raise TypeError("no call")
    return _arguments(node, names)


def _card(tree: ast.Module, path: Path) -> dict[str, Any] | None:
    """The literals of a file's CARD, None where it has none. ValueError where they are no literals."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == "CARD" for target in targets):
            try:
                value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
                card = _call(value, ("paper", "catalogue", "sibling", "exceptions"))
                paper = _call(card.pop("paper"), ("authors", "year", "link", "section"))
                literals = {key: ast.literal_eval(value) for key, value in card.items()}
                return {**literals, "paper": Reference(**{key: ast.literal_eval(value) for key, value in paper.items()})}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: CARD must be Card(Paper(...), catalogue=..., sibling=...) of literals") from error
    return None


def read(name: str, path: Path) -> Entry | None:
    """The entry of one file, None for a file without a card (a form that several methods hold tensors in)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    card = _card(tree, path)
    if card is None:
        return None
    doc = ast.get_docstring(tree) or ""
    return Entry(
        name=name,
        role=_role(tree),
        family=name.split(".")[0],
        catalogue=card["catalogue"],
        paper=card["paper"],
        sibling=card["sibling"],
        exceptions=card.get("exceptions", {}),
        summary=doc.split("\n", 1)[0],
        doc=doc,
    )


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All methods with a card, in order of name."""
    return tuple(entry for name, path in files() if (entry := read(name, path)) is not None)


def select(family: str | None = None, role: str | None = None) -> tuple[Entry, ...]:
    """The methods of a family, a role, or both. Unknown ones are refused with the nearest."""
    if family is not None and family not in (families := sorted({entry.family for entry in entries()})):
        raise UserError(f"unknown family {family!r}{nearest(family, families)}")
    if role is not None:
        by_word = {name.lower(): name for name in roles().values()}
        if role.lower() not in by_word:
            raise UserError(f"unknown role {role!r}{nearest(role, by_word.values())}")
        role = by_word[role.lower()]
    return tuple(entry for entry in entries() if family in (None, entry.family) and role in (None, entry.role))


def find(name: str) -> Entry:
    """One method by name or by a name that it had before."""
    known = {entry.name: entry for entry in entries()}
    now = ALIASES.get(name, name)
    if now not in known:
        last = [full for full in known if full.rpartition(".")[2] == now.lower()]
        raise UserError(f"unknown method {name!r}; did you mean {last[0]!r}?" if last else f"unknown method {name!r}{nearest(name, known)}")
    return known[now]


def claims_file(name: str) -> Path:
    """Where the claims of a method live."""
    family, _, method = name.split(".")
    return CLAIMS / family / f"{method}.py"


def claims(name: str) -> list[str]:
    """The sentences that a method's claims promise, read without importing; empty where none is written."""
    path = claims_file(name)
    if not path.is_file():
        return []
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Claim":
            says = _arguments(node, ("says",)).get("says")
            try:
                found.append(str(ast.literal_eval(says)) if says is not None else "")
            except ValueError:
                found.append(ast.unparse(says) if says is not None else "")
    return found


def verdicts_file(name: str) -> Path:
    """Where `verify --full` records what a method's claims came to."""
    return VERDICTS / f"{name}.json"


def verdicts(name: str) -> list[dict[str, Any]]:
    """The recorded verdicts of a method, one for each claim that was run in full."""
    path = verdicts_file(name)
    return list(json.loads(path.read_text(encoding="utf-8"))["claims"]) if path.is_file() else []


def record(name: str, verdict: Mapping[str, Any], order: Sequence[str]) -> None:
    """Put the verdict of one claim in its place among the method's; `order`: all sentences of its claims. Others that are recorded stay."""
    known = {had["says"]: had for had in verdicts(name)} | {verdict["says"]: dict(verdict)}
    path = verdicts_file(name)
    path.parent.mkdir(exist_ok=True)
    # whole or not at all: whoever is stopped here keeps what was recorded before
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps({"name": name, "claims": [known[says] for says in order if says in known]}, indent=1) + "\n", encoding="utf-8"
    )
    new.replace(path)


def ground(name: str, scale: str) -> str:
    """A hash of what a verdict of a method stands on: its file, its claims' file, the definitions of core, methods and kernels that these
    name and those name in turn, and the embedded models that the claim's scale names. Not of what else moves data and models about."""
    models = [folder / "model.safetensors" for folder in sorted(MODELS.iterdir()) if re.search(rf"\b{folder.name}\b", scale)]
    return _ground(name, tuple(models))


@cache
def _ground(name: str, models: tuple[Path, ...]) -> str:
    """Once in a process, whose code is what it was when it was imported."""
    return hash_of_code(definitions([METHODS.joinpath(*name.split(".")).with_suffix(".py"), claims_file(name)]), models)
