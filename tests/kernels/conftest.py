"""The native kernels built with sanitizers, once for all fuzz tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], None]:
    """Runs a program (its text, a seed, how many turns) that is given the library's path first, and fails where it or a sanitizer does."""
    nanobind = pytest.importorskip("nanobind", reason="building the kernels again needs nanobind")
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("building the kernels again needs cmake and g++")
    where = tmp_path_factory.mktemp("sanitized")
    options = ["-DLACONIC_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind.cmake_dir()}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(where), *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(where)], check=True, capture_output=True)
    (built,) = where.glob("_native*.so")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout.strip()

    def run(program: str, seed: str, turns: int) -> None:
        done = subprocess.run(
            [sys.executable, "-c", program, str(built), seed, str(turns)],
            env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
