"""The size check counts what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("bench_size", ROOT / "bench" / "size.py")
assert spec is not None
assert spec.loader is not None
size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(size)

TEXT = '''"""Doc
over two lines."""

# a comment
import os  # counts


def f(x):
    """Doc."""
    # why
    return {
        "a": x,
    }


S = """text
counts"""
'''


def test_code_lines_leave_out_blanks_comments_and_docstrings() -> None:
    # import, def, three lines of return, two lines of the text
    assert size.code_lines(TEXT) == 7


def test_core_is_under_its_ceiling() -> None:
    lines = sum(size.code_lines(path.read_text(encoding="utf-8")) for path in (size.HOME / "core").glob("*.py"))
    assert 0 < lines <= size.CEILING


def test_imports_see_functions_but_not_type_checking(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from laconic.b import thing\n")
    (tmp_path / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from laconic import a\n")
    (tmp_path / "__init__.py").write_text("")
    assert size.imports(tmp_path) == {"": set(), "a": {"b"}, "b": set()}


def test_the_script_prints_each_figure() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "size.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("core/:", "methods:", "circles of imports: 0", "methods without a passing claim:"):
        assert word in done.stdout
