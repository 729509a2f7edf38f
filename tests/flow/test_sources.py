"""What a result stands on: the definitions that are named, however they are imported, and nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from laconic import sources

TREE = {
    "claims/one.py": "from laconic.methods.one import work\nSAYS = work(1)\n",
    "methods/one.py": '"""One."""\nfrom laconic.core.tools import Base, scaled as times\nfrom laconic.kernels import fast\n\n\n'
    "class One(Base):\n    pass\n\n\ndef work(x):\n    from laconic.kernels.late import later\n\n    return times(fast.run(later(x)))\n",
    "core/tools.py": "FACTOR, OTHER = 2, 3\nLONE = 7\n\n\nclass Base:\n    size: int = 1\n\n\ndef scaled(x):\n    return FACTOR * x\n\n\n"
    "def unused(x):\n    return LONE\n",
    "kernels/fast.py": "from laconic.kernels.deep import held\n\nrun = held\n\n\ndef slow(x):\n    return x\n\n\nprint('loaded')\n",
    "kernels/deep.py": "LIMIT: int = 3\n\n\ndef held(x):\n    return min(x, LIMIT)\n",
    "kernels/late.py": "def later(x):\n    return x\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "HOME", tmp_path)
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def stands_on(tree: Path) -> str:
    return sources.hash_of_code(sources.definitions([tree / "methods" / "one.py", tree / "claims" / "one.py"]))


def changed(tree: Path, name: str, old: str, new: str) -> bool:
    before, path = stands_on(tree), tree / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return stands_on(tree) != before


def test_definitions_are_found_by_name(tree: Path) -> None:
    found = sources.definitions([tree / "methods" / "one.py", tree / "claims" / "one.py"])
    names = {(path.relative_to(tree).as_posix(), name) for path, name in found if name}
    assert names == {
        ("claims/one.py", "SAYS"),
        ("methods/one.py", "One"),
        ("methods/one.py", "work"),
        ("core/tools.py", "Base"),
        ("core/tools.py", "scaled"),
        ("core/tools.py", "FACTOR"),
        ("kernels/fast.py", "run"),
        ("kernels/deep.py", "held"),
        ("kernels/deep.py", "LIMIT"),
        ("kernels/late.py", "later"),
    }


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("core/tools.py", "return LONE", "return 2 * LONE"),
        ("core/tools.py", "LONE = 7", "LONE = 8"),
        ("kernels/fast.py", "def slow(x):\n    return x", "def slow(x):\n    return 2 * x"),
        # words about code are no code
        ("methods/one.py", '"""One."""', '"""Another."""'),
        ("core/tools.py", "return FACTOR * x", "return FACTOR * x  # twice"),
    ],
)
def test_what_is_not_named_does_not_count(tree: Path, name: str, old: str, new: str) -> None:
    assert not changed(tree, name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kernels/deep.py", "LIMIT: int = 3", "LIMIT: int = 4"),
        ("core/tools.py", "FACTOR, OTHER = 2", "FACTOR, OTHER = 1"),
        ("core/tools.py", "size: int = 1", "size: int = 2"),
        ("kernels/late.py", "return x", "return -x"),
        # what a module does when it is imported
        ("kernels/fast.py", "print('loaded')", "print('ready')"),
        ("claims/one.py", "work(1)", "work(2)"),
    ],
)
def test_what_is_named_counts(tree: Path, name: str, old: str, new: str) -> None:
    assert changed(tree, name, old, new)
