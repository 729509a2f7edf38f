"""Every method has its claims, and each says what it must. No claim is run here: tests guard the code, claims guard the promise."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from laconic import api, catalogue
from laconic.claims.lab import judged, open_bench, spread
from laconic.core.claim import Claim, Lab, Measurement

NAMES = [entry.name for entry in catalogue.entries()]
EACH = [(name, claim) for name in NAMES for claim in api.claims_of(name)]
IDS = [f"{name}-{i}" for name in NAMES for i in range(len(api.claims_of(name)))]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_claim(name: str) -> None:
    assert api.claims_of(name), f"{name} has no claim: write {catalogue.claims_file(name)}"


def test_every_claims_file_belongs_to_a_method() -> None:
    known = {catalogue.claims_file(name) for name in NAMES}
    found = {path for path in catalogue.CLAIMS.glob("*/*.py") if path.stem != "__init__"}
    assert found == known


@pytest.mark.parametrize(("name", "claim"), EACH, ids=IDS)
def test_a_claim_is_whole(name: str, claim: Claim) -> None:
    assert isinstance(claim, Claim)
    assert claim.says.endswith(".")
    assert claim.scale
    # an arXiv id or a DOI, and who and when
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|10\.\d{4,}/\S+", claim.where.link)
    assert claim.where.authors
    assert 1900 < claim.where.year < 2100
    for check in (claim.check, claim.broken):
        # a Lab is all that a check is given
        free = [p for p in inspect.signature(check).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(free) == 1
    assert claim.check is not claim.broken


@pytest.mark.parametrize(("name", "claim"), EACH, ids=IDS)
def test_the_stand_in_is_another(name: str, claim: Claim) -> None:
    def parts(check: object) -> tuple[object, ...]:
        return (getattr(check, "func", check), getattr(check, "args", ()), tuple(sorted(getattr(check, "keywords", {}).items(), key=str)))

    assert parts(claim.check) != parts(claim.broken)


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_cites_a_paper_of_the_method(name: str) -> None:
    entry = catalogue.find(name)
    assert entry.sibling in NAMES
    # the card's paper, or another that the docstring names
    assert any(claim.where.link in entry.doc for claim in api.claims_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_read_without_importing(name: str) -> None:
    assert catalogue.claims(name) == [claim.says for claim in api.claims_of(name)]


def test_models_whose_data_is_not_there_are_not_checked(tmp_path: Path) -> None:
    assert open_bench("stories260k", None, True) is None
    assert open_bench("resnet20", tmp_path, True) is None
    lab = Lab(None, True, lambda line: None, tmp_path)
    claim = next(claim for name, claim in EACH if claim.scale.startswith("stories260k"))
    verdict = claim.check(lab)
    assert verdict.result == "cannot be checked here"
    assert "--lab" in verdict.reason


def test_verdicts() -> None:
    assert judged([], {}).result == "holds"
    assert judged(["this", "that"], {}) == ("fails", {}, "this; that")
    assert spread([1.0, 3.0], "nats") == Measurement(2.0, "nats", 2, 1.0, 3.0, 2**0.5)
    assert spread([1.0], "nats").spread is None
