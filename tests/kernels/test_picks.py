"""Which way products with codes go: what is measured is kept for its machine alone, and both ways give the same product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from laconic import picking
from laconic.kernels import picks
from laconic.kernels.linear import rows_for
from laconic.kernels.native import native
from laconic.kernels.picks import EVERY, LARGE, PRODUCTS, Pick, Product, forced, rows_of

SMALL = Product("grouped", 4, True, False)
bf16, fp32 = torch.bfloat16, torch.float32


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    where = tmp_path / "deep" / "picks.json"
    monkeypatch.setenv("LACONIC_PICKS", str(where))
    picks.forget()
    yield where
    picks.forget()


def test_nothing_is_read_where_shipped_numbers_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_PICKS", "shipped")
    picks.forget()
    assert picks.file() is None and picks.kept() == [] and picks.keep([]) is None
    assert rows_of("grouped", 4, bf16, 1000, 17) == 17


def test_the_file_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LACONIC_PICKS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert picks.file() == tmp_path / "laconic" / "picks.json"


def test_what_is_kept_is_read_by_form_bits_inputs_and_size(kept: Path) -> None:
    found = [
        Pick(SMALL, 48, {1: (0.5, 2.0), 64: (3.0, 2.5)}),
        Pick(SMALL._replace(large=True), EVERY),
        Pick(SMALL._replace(form="lookup"), 0),
    ]
    assert rows_of("grouped", 4, bf16, 1000, 17) == 17
    assert picks.keep(found) == kept and picks.kept() == found
    assert rows_of("grouped", 4, bf16, LARGE - 1, 17) == 48 and rows_of("grouped", 4, bf16, LARGE, 17) == EVERY
    assert rows_of("lookup", 4, bf16, 0, 17) == 0
    # what was not measured
    assert rows_of("grouped", 4, fp32, 0, 17) == rows_of("grouped", 2, bf16, 0, 17) == 17
    with forced(3):
        assert rows_of("grouped", 4, bf16, 0, 17) == 3
    assert rows_of("grouped", 4, bf16, 0, 17) == 48
    level = native().level if native() is not None else "plain"
    assert rows_for(level, 4, bf16, True, 1000) == 48 != rows_for(level, 4, bf16, False, 1000)


def test_other_machines_and_threads_have_their_own(kept: Path) -> None:
    before = torch.get_num_threads()
    picks.keep([Pick(SMALL, 48)])
    try:
        torch.set_num_threads(before + 1)
        assert picks.kept() == [] and rows_of("grouped", 4, bf16, 0, 17) == 17
        picks.keep([Pick(SMALL, 5)])
        assert rows_of("grouped", 4, bf16, 0, 17) == 5
    finally:
        torch.set_num_threads(before)
    assert rows_of("grouped", 4, bf16, 0, 17) == 48
    assert len(json.loads(kept.read_text())["machines"]) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "machines": 3}', '{"format": 1, "machines": {"%s": {"%s": 1}}}']
)
def test_a_damaged_file_is_none_and_is_written_anew(kept: Path, text: str) -> None:
    kept.parent.mkdir()
    kept.write_text(text % (picks.machine(torch.get_num_threads()), SMALL.name) if "%s" in text else text)
    assert picks.kept() == [] and rows_of("grouped", 4, bf16, 0, 17) == 17
    assert picks.keep([Pick(SMALL, 2)]) == kept and picks.kept() == [Pick(SMALL, 2)]


def test_a_place_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LACONIC_PICKS", str(tmp_path / "file" / "picks.json"))
    assert picks.keep([Pick(SMALL, 2)]) is None
    picks.forget()


@pytest.mark.parametrize("product", PRODUCTS, ids=[product.name for product in PRODUCTS])
def test_both_ways_give_the_same_product(product: Product) -> None:
    run, m = picking._case(product._replace(large=False))
    x = torch.randn(3, m, generator=torch.Generator().manual_seed(0)).to(bf16 if product.narrow else fp32)
    with torch.inference_mode():
        with forced(EVERY):
            kernel = run(x).float()
        with forced(0):
            dense = run(x).float()
    assert float((kernel - dense).norm()) <= (1e-2 if product.narrow else 1e-5) * float(dense.norm())


@pytest.mark.skipif(native() is None, reason="there are no kernels to choose")
def test_it_is_measured_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "measured", lambda progress: found(progress))
    real, lines, seen = picking._measured, [], []

    def found(progress: object) -> list[Pick]:
        progress(0, 1)  # type: ignore[operator]
        return [real(SMALL, (1, 2))]

    first = picking.known(lambda *said: seen.append(said), lines.append)
    assert first[0].rows in (0, 1, EVERY) and set(first[0].ms) == {1, 2} and all(ms > 0 for both in first[0].ms.values() for ms in both)
    assert seen == [("timing", 0, 1, "products with codes, once on this machine")] and str(kept) in lines[0]
    again = picking.known(lambda *said: seen.append(said), lines.append)
    assert again == first and len(lines) == len(seen) == 1
