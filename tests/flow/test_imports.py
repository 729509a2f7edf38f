"""Who may import whom: the graph of imports has no arrow up and no circle."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "src" / "laconic"

# lower numbers know nothing of higher ones; a name covers the folder or the module
LAYERS = [
    ("core",),
    ("kernels",),
    (
        "anatomy",
        "architectures",
        "encoders",
        "experts",
        "models",
        "narrow",
        "data",
        "calibration",
        "journal",
        "artifact",
        "plugin",
        "runtime",
        "methods",
    ),
    ("zoo",),
    (
        "aligning",
        "restoring",
        "budget",
        "decoding",
        "stepping",
        "recipe",
        "tuning",
        "reconstruction",
        "cutting",
        "trials",
        "pipeline",
        "nesting",
        "elastic",
        "measurement",
        "picking",
        "routing",
        "selection",
    ),
    ("job",),
    ("advice", "vectors"),
    ("page", "serve"),
    ("sources",),
    ("catalogue",),
    ("claims", "verifying"),
    ("api",),
    ("cli",),
    ("__main__", ""),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# names of methods are resolved by path at run time: only these may import them
KNOW_METHODS = {"methods", "zoo", "claims", "verifying", "api", "catalogue", "cli"}
KNOW_ZOO = {"zoo", "claims", "api", "cli"}


def _size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_size", ROOT / "bench" / "size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZE = _size()
GRAPH: dict[str, set[str]] = SIZE.imports()


def _part(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_a_layer() -> None:
    assert {_part(name) for name in GRAPH} <= set(LEVEL)


def test_no_arrow_up() -> None:
    up = [(a, b) for a, targets in GRAPH.items() for b in targets if LEVEL[_part(b)] > LEVEL[_part(a)]]
    # the package's own lazy names are looked up in api, and its one eager import is the plugin
    assert [edge for edge in up if edge[0] != ""] == []


def test_no_circle() -> None:
    assert SIZE.circles(GRAPH) == []


def test_only_the_top_knows_methods_and_zoo() -> None:
    assert [(a, b) for a, t in GRAPH.items() for b in t if _part(b) == "methods" and _part(a) not in KNOW_METHODS] == []
    assert [(a, b) for a, t in GRAPH.items() for b in t if _part(b) == "zoo" and _part(a) not in KNOW_ZOO] == []


def test_no_family_imports_a_family() -> None:
    def family(name: str) -> str:
        return name.split(".")[1] if name.count(".") >= 1 else ""

    crossing = [
        (a, b)
        for a, targets in GRAPH.items()
        for b in targets
        if _part(a) == _part(b) == "methods" and family(a) and family(b) and family(a) != family(b)
    ]
    assert crossing == []


def test_methods_use_core_and_kernels_only() -> None:
    wrong = [(a, b) for a, t in GRAPH.items() for b in t if _part(a) == "methods" and _part(b) not in {"core", "kernels", "methods"}]
    assert wrong == []


@pytest.mark.parametrize("path", sorted((HOME / "core").glob("*.py")), ids=lambda path: path.stem)
def test_core_imports_torch_and_the_standard_library_only(path: Path) -> None:
    allowed = {"torch", "typing_extensions", "laconic", *sys.stdlib_module_names}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found <= allowed


def test_folders_hold_one_paragraph_and_no_logic() -> None:
    for path in (HOME / "methods").rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def test_methods_live_at_one_depth() -> None:
    files = [path.relative_to(HOME / "methods").parts for path in (HOME / "methods").rglob("*.py") if path.stem != "__init__"]
    assert files
    assert {len(parts) for parts in files} == {3}


def test_import_brings_no_torch() -> None:
    code = "import laconic, sys; print(sorted({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules)), laconic.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ")[0] == "[]"


def test_triton_is_imported_by_the_kernels_for_gpus_alone() -> None:
    found = {path for path in HOME.rglob("*.py") if re.search(r"^\s*(import|from) triton", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert found
    assert {path.parent for path in found} == {HOME / "kernels" / "gpu"}
    # its modules are reached by name, once there is something to compute
    inside = {f"kernels.gpu.{path.stem}" for path in (HOME / "kernels" / "gpu").glob("*.py")}
    assert [(a, b) for a, targets in GRAPH.items() for b in targets & inside if not a.startswith("kernels.gpu.")] == []


def test_kernels_know_nothing_of_those_for_gpus() -> None:
    low = {name for name in GRAPH if _part(name) in {"core", "kernels", "methods"} and not name.startswith("kernels.gpu")}
    assert [(a, b) for a in low for b in GRAPH[a] if b.startswith("kernels.gpu")] == []


def test_the_top_level_exports_what_it_names() -> None:
    code = "import laconic; print([name for name in laconic.__all__ if not hasattr(laconic, name)], callable(laconic.compress))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_a_circle_is_found() -> None:
    assert SIZE.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert SIZE.circles({"a": {"b"}, "b": set()}) == []
