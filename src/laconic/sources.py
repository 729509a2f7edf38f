"""What a result depends on in the project's own files, as hashes: code without comments and docstrings, and what it imports."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HOME = Path(__file__).parent


def _code_lines(text: str, tree: ast.Module) -> dict[int, str]:
    """Lines by number, without comments, docstrings and blank ones."""
    lines = text.splitlines()
    drop: set[int] = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            drop.update(range(node.body[0].lineno - 1, node.body[0].end_lineno or 0))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column]
    kept = {number: line.rstrip() for number, line in enumerate(lines, 1) if number - 1 not in drop}
    return {number: line for number, line in kept.items() if line}


@lru_cache(4096)
def code_of(text: str) -> str:
    """Python source without comments, docstrings and blank lines: what its behaviour depends on."""
    return "\n".join(_code_lines(text, ast.parse(text)).values())


def _sources(node: ast.ImportFrom) -> dict[str, tuple[Path, str | None]]:
    """What a statement imports of core, methods and kernels, by local name: the file, and the name in it (none: the file itself)."""
    module = node.module or ""
    if not module.startswith(("laconic.core", "laconic.methods", "laconic.kernels")):
        return {}
    inside = HOME.joinpath(*module.split(".")[1:])
    found: dict[str, tuple[Path, str | None]] = {}
    for alias in node.names:
        if (inside / f"{alias.name}.py").is_file():
            found[alias.asname or alias.name] = inside / f"{alias.name}.py", None
        elif inside.with_suffix(".py").is_file():
            found[alias.asname or alias.name] = inside.with_suffix(".py"), alias.name
    return found


def reached(start: Iterable[Path]) -> set[Path]:
    """These files and all of core, methods and kernels that they import, and that those import."""
    found: set[Path] = set()
    waiting = list(start)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                waiting += [near for near, _ in _sources(node).values()]
    return found


@dataclass(frozen=True)
class _Module:
    """A file's statements: those that define a name, by it, and the others; what each is in code, and what each names elsewhere."""

    defines: dict[str, list[ast.stmt]]
    others: list[ast.stmt]
    lines: dict[int, str]
    # local name -> file, and the name in it (none: the file itself)
    imports: dict[str, tuple[Path, str | None]]

    # name -> what defines it in code, and what that names elsewhere, as they were asked for
    asked: dict[str, tuple[str | None, tuple[tuple[Path, str | None], ...]]]

    @staticmethod
    @lru_cache(4096)
    def of(path: Path, text: str) -> _Module:
        """A file with that text."""
        tree = ast.parse(text)
        module = _Module({}, [], _code_lines(text, tree), {}, {})
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module.imports.update(_sources(node))
        for node in tree.body:
            names = _defined(node)
            for name in names:
                module.defines.setdefault(name, []).append(node)
            if not names and not isinstance(node, ast.Import | ast.ImportFrom):
                module.others.append(node)
        return module

    def definition(self, name: str, here: Path) -> tuple[str | None, tuple[tuple[Path, str | None], ...]]:
        """The code that gives a name its meaning (name "": what the file does besides defining names), and all that it names; none where
        nothing does."""
        if name not in self.asked:
            nodes = self.defines.get(name, []) if name else self.others
            code = "\n".join(map(self.code, nodes)) if nodes else None
            self.asked[name] = code, tuple(one for node in nodes for one in self.named(node, here))
        return self.asked[name]

    def code(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        return "\n".join(self.lines[i] for i in range(first, (node.end_lineno or first) + 1) if i in self.lines)

    def named(self, node: ast.AST, here: Path) -> Iterator[tuple[Path, str | None]]:
        """Definitions that a statement names: of this file, of others, or (none) all of another's."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and self.imports.get(node.value.id, (here, ""))[1] is None:
            yield self.imports[node.value.id][0], node.attr
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield self.imports.get(node.id, (here, node.id))
        for below in ast.iter_child_nodes(node):
            yield from self.named(below, here)


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module gives a meaning to."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def definitions(start: Iterable[Path]) -> dict[tuple[Path, str], str]:
    """The code of all definitions of these files, and of those of core, methods and kernels that they name, that those name, and so on,
    by file and name; of each such file also what it does besides defining names."""
    modules: dict[Path, _Module] = {}
    found: dict[tuple[Path, str], str] = {}
    waiting: list[tuple[Path, str | None]] = [(path, None) for path in start]
    while waiting:
        path, name = waiting.pop()
        if (path, name) in found:
            continue
        if path not in modules:
            modules[path] = _Module.of(path, path.read_text(encoding="utf-8"))
            waiting.append((path, ""))
        module = modules[path]
        if name is None:
            waiting += [(path, one) for one in module.defines]
            continue
        if name in module.imports:
            waiting.append(module.imports[name])
        code, names = module.definition(name, path)
        if code is not None:
            found[path, name] = code
            waiting += names
    return found


def hash_of(paths: Iterable[Path], base: Path = HOME) -> str:
    """sha256 over names below `base` and contents; of Python files the code alone."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = code_of(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{path.relative_to(base).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def hash_of_code(found: Mapping[tuple[Path, str], str], paths: Iterable[Path] = ()) -> str:
    """sha256 over definitions and what is beside them."""
    digest = hashlib.sha256(hash_of(paths).encode())
    for (path, name), code in sorted(found.items()):
        digest.update(f"{path.relative_to(HOME).as_posix()} {name} {hashlib.sha256(code.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()
