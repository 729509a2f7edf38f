"""Every method has its claims, and each says what it must. No claim is run here: tests guard the code, claims guard the promise."""

from __future__ import annotations

import inspect
import multiprocessing
import re
from functools import partial
from pathlib import Path

import pytest

from bench import verdicts
from laconic import api, catalogue, verifying
from laconic.claims.lab import judged, open_bench, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Result, Verdict
from laconic.core.errors import UserError

NAMES = [entry.name for entry in catalogue.entries()]
EACH = [(name, claim) for name in NAMES for claim in verifying.claims_of(name)]
IDS = [f"{name}-{i}" for name in NAMES for i in range(len(verifying.claims_of(name)))]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_claim(name: str) -> None:
    assert verifying.claims_of(name), f"{name} has no claim: write {catalogue.claims_file(name)}"


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
    assert any(claim.where.link in entry.doc for claim in verifying.claims_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_read_without_importing(name: str) -> None:
    assert catalogue.claims(name) == [claim.says for claim in verifying.claims_of(name)]


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


def test_verdicts_are_recorded_as_they_come_and_not_found_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, runs = "quantize.round.rtn", []
    monkeypatch.setattr(catalogue, "VERDICTS", tmp_path)

    def claim(says: str, result: Result) -> Claim:
        def check(lab: Lab) -> Verdict:
            runs.append(says if not lab.quick else f"{says} quick")
            if stopped and says == "Second.":
                raise KeyboardInterrupt
            return Verdict(result, {"gain": Measurement(gain, "", 1)})

        return Claim(says, Paper("Somebody", 2020, "arXiv:2001.00001"), "nano", check, lambda lab: Verdict("fails", {}))

    claims = [claim("First.", "holds"), claim("Second.", "fails"), claim("Third.", "cannot be checked here")]
    monkeypatch.setattr(verifying, "claims_of", lambda _: tuple(claims))
    verify = partial(api.verify, name, lab=None, log=lambda _: None)
    stopped, gain = True, 2.0
    with pytest.raises(KeyboardInterrupt):
        verify(full=True)
    assert [one["says"] for one in catalogue.verdicts(name)] == ["First."]
    stopped = False
    found = verify(full=True)
    # the quick form of each comes after all, as its witness
    assert runs == ["First.", "Second.", "Second.", "Third.", "First. quick", "Second. quick"]
    assert not found["ok"]
    recorded = catalogue.verdicts(name)
    assert [(one["says"], one["result"]) for one in recorded] == [("First.", "holds"), ("Second.", "fails")]
    assert {"seconds", "versions", "hardware", "broken", "ground"} <= set(recorded[0])
    assert [one["witness"] for one in recorded] == [{"gain": 2.0}] * 2
    del runs[:]
    verify(full=True)
    assert runs == ["Third."]
    # of one number, again
    del runs[:]
    verify(full=True, again=True, claim=2)
    assert runs == ["Second.", "Second. quick"]
    # what the quick form finds is not recorded, and what was found with other code is found anew
    verify()
    assert catalogue.verdicts(name)[0] == recorded[0]
    # code has changed, which the witnesses do not notice
    monkeypatch.setattr(catalogue, "ground", lambda name, scale: "other")
    del runs[:]
    verify(full=True)
    assert runs == ["First. quick", "Second. quick", "Third."]
    assert [one["ground"] for one in catalogue.verdicts(name)] == ["other"] * 2
    assert "confirmed" in catalogue.verdicts(name)[0]
    # and which they do: what was found is not found again by those who only confirm
    monkeypatch.setattr(catalogue, "ground", lambda name, scale: "another")
    del runs[:]
    kept = catalogue.verdicts(name)
    gain = 2.1
    assert [one["says"] for one in verify(confirm=True)["methods"][0]["claims"]] == ["First.", "Second."]
    assert runs == ["First. quick", "Second. quick"] and catalogue.verdicts(name) == kept
    gain = 2.0
    verify(confirm=True, claim=2)
    assert [one["ground"] for one in catalogue.verdicts(name)] == ["other", "another"]
    assert catalogue.verdicts(name)[1]["witness_seconds"] >= 0
    del runs[:]
    gain = 2.1
    verify(full=True, claim=1)
    assert runs == ["First. quick", "First.", "First. quick"]
    assert "confirmed" not in catalogue.verdicts(name)[0]
    assert catalogue.verdicts(name)[0]["witness"] == {"gain": 2.1}
    # a claim that is no more goes with the next that is recorded
    del claims[0]
    verify(full=True, again=True)
    assert [one["says"] for one in catalogue.verdicts(name)] == ["Second."]
    with pytest.raises(UserError, match="--claim 3: name a method and one of its claims, 1 to 2"):
        verify(claim=3)


def test_a_verdict_stands_on_code_and_model() -> None:
    grounds = {
        catalogue.ground(name, scale) for name in ("quantize.round.rtn", "quantize.round.gptq") for scale in ("nano", "mamba", "MNIST")
    }
    assert len(grounds) == 6
    assert catalogue.ground("quantize.round.rtn", "nano, as above") == catalogue.ground("quantize.round.rtn", "nano")


def test_the_page_of_verdicts_is_what_was_recorded() -> None:
    def known(text: str) -> str:
        # on which code a verdict was found changes with every edit of a method; what it was does not
        return text.replace(verdicts.EARLIER, "")

    assert known(verdicts.PAGE.read_text(encoding="utf-8")) == known(verdicts.page()), "run python -m bench.verdicts"


def test_methods_of_a_family_are_checked_side_by_side() -> None:
    lines: list[str] = []
    seen: list[tuple[int, int, str]] = []
    entries = catalogue.select(family="route")
    assert len(entries) > 1
    found = verifying.verify(entries, None, full=False, log=lines.append, progress=lambda *where: seen.append(where[1:]))
    assert [one["name"] for one in found] == [entry.name for entry in entries]
    for one in found:
        # in the order of the claims, whoever was done first
        assert [claim["says"] for claim in one["claims"]] == catalogue.claims(one["name"])
        assert {claim["result"] for claim in one["claims"]} == {"cannot be checked here"}
    total = sum(len(one["claims"]) for one in found)
    assert seen[-1][:2] == (total, total)
    assert sum("cannot be checked here" in line for line in lines) == total


def test_what_ten_minutes_do_not_reach_is_named(monkeypatch) -> None:
    monkeypatch.setattr(verifying, "LATEST", -1)
    lines: list[str] = []
    entries = catalogue.select(family="route")
    for one in verifying.verify(entries, None, full=False, log=lines.append):
        says = catalogue.claims(one["name"])
        assert one["claims"] == [] and one["left"] == says
        assert any(line.startswith(f"{one['name']}: {len(says)} of {len(says)} claims left") for line in lines)


def test_of_each_method_a_claim_on_the_smallest_model_comes_first() -> None:
    def check(lab: Lab) -> Verdict:
        return Verdict("holds", {})

    paper = Paper("Somebody", 2020, "arXiv:2001.00001")
    claims = [Claim("Quick.", paper, scale, check, check) for scale in ("nano, 3 draws", "stories260k, 3 draws", "random matrices")]
    assert verifying._quickest(claims, {}, Path()) == 1 and verifying._quickest(claims, {}, None) == 0
    assert verifying._quickest(claims[:1], {}, Path()) == 0
    # what is known to cost little goes before what is only thought to
    assert verifying._quickest(claims, {claims[0].says: 3.0}, Path()) == 0


def test_times_are_taken_alone_and_in_one_draw() -> None:
    beside: list[str] = []
    labs: list[Lab] = []

    def check(lab: Lab) -> Verdict:
        labs.append(lab)
        beside.append(multiprocessing.current_process().name)
        return Verdict("holds", {})

    claim = Claim("Quick.", Paper("Somebody", 2020, "arXiv:2001.00001"), "nano", check, check, timed=True)
    found = verifying._side_by_side({"a.b.c": [claim], "a.b.d": [claim]}, {"a.b.c": {}, "a.b.d": {}}, None, lambda _: None, lambda *_: None)
    assert [len(verdicts) for verdicts in found.values()] == [1, 1]
    assert set(beside) == {"MainProcess"}
    assert {tuple(lab.draws((0, 1, 2))) for lab in labs} == {(0,)}
