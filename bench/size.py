"""How large the house is: code lines of core/, longest and median method, circles of imports, methods without a passing claim.

`python bench/size.py` prints the figures; exit code 1 where core/ is over its ceiling or a circle exists."""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / "src" / "laconic"
CEILING = 2_000
LONGEST = 200

# a comment, an end of line and an indentation are no code
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - docs)


def modules(home: Path = HOME) -> dict[str, Path]:
    """Every module below `home` by dotted name without the package; the package itself is ``."""
    found = {}
    for path in sorted(home.rglob("*.py")):
        parts = path.relative_to(home).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports anywhere in a file, inside functions too; those for type checkers alone are no dependency."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            yield from _statements(child)


def imports(home: Path = HOME, package: str = "laconic") -> dict[str, set[str]]:
    """Module -> modules of the package that it imports. `from laconic import __version__` is no edge: the root only names things."""
    known = modules(home)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"{path}: relative import; write the whole path")
                base = node.module or ""
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                targets = [alias.name for alias in node.names]
            for target in targets:
                if not f"{target}.".startswith(f"{package}."):
                    continue
                short = target[len(package) + 1 :]
                # a name in a module counts as the module
                while short and short not in known:
                    short = short.rpartition(".")[0]
                if short and short != name:
                    graph[name].add(short)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of more than one), by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == name:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def main() -> int:
    """Prints the figures; 1 where a hard bound is broken."""
    from laconic import catalogue

    core = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in sorted((HOME / "core").glob("*.py"))}
    whole = sum(code_lines(path.read_text(encoding="utf-8")) for path in HOME.rglob("*.py"))
    methods = {name: code_lines(path.read_text(encoding="utf-8")) for name, path in catalogue.files()}
    rings = circles(imports())
    unproven = [e.name for e in catalogue.entries() if not e.verdicts or any(v["result"] != "holds" for v in e.verdicts)]
    print(f"core/: {sum(core.values())} code lines in {len(core)} files (ceiling {CEILING})")
    print(f"whole package: {whole} code lines")
    if methods:
        longest = max(methods, key=lambda name: methods[name])
        over = "" if methods[longest] <= LONGEST else f", over {LONGEST}: cut it or move parts down"
        median = statistics.median(methods.values())
        print(f"methods: {len(methods)} files, longest {longest} with {methods[longest]} code lines{over}, median {median:g}")
    print(f"circles of imports: {len(rings)}" + "".join(f"\n  {' <-> '.join(ring)}" for ring in rings))
    print(f"methods without a passing claim: {len(unproven)} of {len(catalogue.entries())}" + "".join(f"\n  {name}" for name in unproven))
    return int(sum(core.values()) > CEILING or bool(rings))


if __name__ == "__main__":
    sys.exit(main())
