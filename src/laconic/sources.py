"""What a result depends on in the project's own files, as hashes: code without comments and docstrings, and what it imports."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

HOME = Path(__file__).parent


def code_of(text: str) -> str:
    """Python source without comments, docstrings and blank lines: what its behaviour depends on."""
    lines = text.splitlines()
    drop: set[int] = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            drop.update(range(node.body[0].lineno - 1, node.body[0].end_lineno or 0))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column]
    kept = (line.rstrip() for number, line in enumerate(lines) if number not in drop)
    return "\n".join(line for line in kept if line)


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
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("laconic.core", "laconic.methods", "laconic.kernels")):
                inside = HOME.joinpath(*(node.module or "").split(".")[1:])
                tried = [inside.with_suffix(".py"), *(inside / f"{alias.name}.py" for alias in node.names)]
                waiting += [near for near in tried if near.is_file()]
    return found


def hash_of(paths: Iterable[Path], base: Path = HOME) -> str:
    """sha256 over names below `base` and contents; of Python files the code alone."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = code_of(path.read_text(encoding="utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{path.relative_to(base).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
