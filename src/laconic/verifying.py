"""Claims put to the test, at full scale with a record or in their quick forms; the quick forms of a family side by side."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from laconic import catalogue, job, measurement
from laconic.core.claim import Claim, Lab, Measurement, Verdict
from laconic.core.errors import UserError
from laconic.kernels.memory import give_back, trim
from laconic.pipeline import Log, Progress, quiet

# the quick form takes one of a claim's draws; older witnesses took all
QUICK = 1
# what the quick forms of a method may take of the memory, in bytes: workers beyond it are not started
ROOM = 4 * 1024**3
# seconds: a family is checked in ten minutes, so no claim begins later than this
LATEST = 7.5 * 60
# what a quick form may cost of which nothing is known, in seconds
UNKNOWN = 60.0


def claims_of(name: str) -> tuple[Claim, ...]:
    """The claims of a method, imported."""
    if not catalogue.claims_file(name).is_file():
        return ()
    family, _, method = name.split(".")
    return tuple(importlib.import_module(f"laconic.claims.{family}.{method}").CLAIMS)


def verify(
    entries: Sequence[catalogue.Entry],
    data: Path | None,
    *,
    full: bool,
    again: bool = False,
    confirm: bool = False,
    claim: int | None = None,
    log: Log,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Each method's name, scale, verdicts and the claims that were `left`, in the order given; methods without a claim are left out. claim:
    one of a single method's by its number, from 1. confirm: what is recorded, by quick forms where code has changed, and nothing else.
    Quick forms of several methods run side by side, a process for each core, those whose figures are times alone after them; one claim of
    every method, then the others, as far as ten minutes last."""
    chosen: dict[str, list[Claim]] = {}
    for entry in entries:
        claims = claims_of(entry.name)
        if not claims:
            log(f"{entry.name}: no claim is written yet")
            continue
        if claim is not None and not (len(entries) == 1 and 1 <= claim <= len(claims)):
            raise UserError(
                f"--claim {claim}: name a method and one of its claims, 1 to {len(claims)}; `laconic show {entry.name}` lists them"
            )
        chosen[entry.name] = list(claims if claim is None else claims[claim - 1 : claim])
    if confirm:
        found = {entry.name: _confirmed(entry, chosen[entry.name], data, log) for entry in entries if entry.name in chosen}
        chosen = {name: [one for one in claims if one.says in {had["says"] for had in found[name]}] for name, claims in chosen.items()}
    elif full:
        found = {entry.name: _recorded(entry, chosen[entry.name], data, again, log) for entry in entries if entry.name in chosen}
    elif len(chosen) > 1:
        took = {
            entry.name: {one["says"]: float(one["witness_seconds"]) for one in entry.verdicts if "witness_seconds" in one}
            for entry in entries
        }
        found = _side_by_side(chosen, took, data, log, progress)
    else:
        found = {name: [_judge(name, one, _quick_lab(data, log)) for one in claims] for name, claims in chosen.items()}
    answers = []
    for name, verdicts in found.items():
        reached = {one["says"] for one in verdicts}
        left = [one.says for one in chosen[name] if one.says not in reached]
        if left:
            log(f"{name}: {len(left)} of {len(chosen[name])} claims left when ten minutes were over; `laconic verify {name}` runs them")
        answers.append({"name": name, "quick": not full, "claims": verdicts, "left": left})
    return answers


# ---- quick


def _side_by_side(
    chosen: Mapping[str, Sequence[Claim]], took: Mapping[str, Mapping[str, float]], data: Path | None, log: Log, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """took: what quick forms are known to have cost, in seconds, by method and what the claim says."""
    until = time.time() + LATEST
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in chosen}
    total = sum(map(len, chosen.values()))

    def add(name: str, i: int, verdict: dict[str, Any]) -> None:
        found[name][i] = verdict
        progress("verifying", sum(map(len, found.values())), total, name)

    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(chosen), measurement.hardware()["memory_bytes"] // ROOM))
    leading = {name: _quickest(claims, took[name], data) for name, claims in chosen.items()}
    spent = {name: [took[name].get(one.says, UNKNOWN) for one in claims] for name, claims in chosen.items()}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (threads // workers,)) as pool:
        try:
            # one claim of every method, then the others: a method a task, as its claims share models and what was measured on them
            for first in (True, False):
                numbers = {
                    name: [i for i, one in enumerate(claims) if (i == leading[name]) == first and not one.timed]
                    for name, claims in chosen.items()
                }
                # what costs little first, so that more is reached
                numbers = {name: sorted(those, key=lambda i, name=name: spent[name][i]) for name, those in numbers.items() if those}  # type: ignore[misc]
                order = sorted(numbers, key=lambda name: sum(spent[name][i] for i in numbers[name]))
                running = {pool.submit(_quick, name, numbers[name], data, until): name for name in order}
                for future in as_completed(running):
                    name = running[future]
                    verdicts, lines = future.result()
                    for line in lines:
                        log(line)
                    # fewer where the time was over
                    for i, verdict in zip(numbers[name], verdicts, strict=False):
                        add(name, i, verdict)
        except BrokenProcessPool as error:
            raise UserError("a process that checked claims was killed, mostly for want of memory: verify the methods one by one") from error
        finally:
            pool.shutdown(cancel_futures=True)
    for first in (True, False):
        for name, claims in chosen.items():
            for i, one in enumerate(claims):
                if one.timed and (i == leading[name]) == first and time.time() < until:
                    add(name, i, _judge(name, one, _quick_lab(data, log)))
    return {name: [verdict for _, verdict in sorted(verdicts.items())] for name, verdicts in found.items()}


def _quickest(claims: Sequence[Claim], took: Mapping[str, float], data: Path | None) -> int:
    """The claim that is known to cost least; where nothing is known, the first on the smallest models that are here: those that are always
    here are the largest."""
    if known := [i for i, one in enumerate(claims) if one.says in took]:
        return min(known, key=lambda i: took[claims[i].says])
    here = range(len(claims)) if data is not None else []
    return next((i for i in here if not re.search(r"\b(nano|mamba)\b", claims[i].scale)), 0)


def _begin(threads: int) -> None:
    """A process of a family's quick forms: so many threads, a quarter of the rows."""
    # where no claim is checked nothing of theirs is loaded
    from laconic.claims.lab import quick_rows

    torch.set_num_threads(threads)
    give_back()
    quick_rows.set(quick_rows.get() // 4)


def _quick(name: str, which: Sequence[int], data: Path | None, latest: float) -> tuple[list[dict[str, Any]], list[str]]:
    """In a process of its own: verdicts of a method's claims by number from 0, none begun after `latest` (of time.time()), and what was
    logged."""
    from laconic.claims.lab import forget

    claims = claims_of(name)
    lines: list[str] = []
    verdicts = []
    for i in which:
        if time.time() >= latest:
            break
        verdicts.append(_judge(name, claims[i], _quick_lab(data, lines.append)))
    forget()
    trim()
    return verdicts, lines


def _quick_lab(data: Path | None, log: Log) -> Lab:
    return Lab(data, True, log, None, QUICK)


# ---- full


def _recorded(entry: catalogue.Entry, claims: Sequence[Claim], data: Path | None, again: bool, log: Log) -> list[dict[str, Any]]:
    says = [one.says for one in claims_of(entry.name)]
    verdicts = [_verdict(entry, one, says, data, again, log) for one in claims]
    # after all others, as the two scales do not fit into memory together
    return [_witnessed(entry, one, had, says, data, log) for one, had in zip(claims, verdicts, strict=True)]


def _verdict(entry: catalogue.Entry, claim: Claim, says: Sequence[str], data: Path | None, again: bool, log: Log) -> dict[str, Any]:
    """A claim's verdict at full scale: the recorded one where it still stands, else a new one. says: of all claims, in their order."""
    had = None if again else _had(entry, claim)
    if had is not None and _stands(entry, claim, had, says, data, log):
        log(f"{entry.name}: {had['result']}, as recorded (--again runs it anew): {claim.says}")
        return had
    verdict = _judge(entry.name, claim, Lab(data, False, log, None)) | {"ground": catalogue.ground(entry.name, claim.scale)}
    # a promise that could not be looked at is no verdict
    if verdict["result"] != "cannot be checked here":
        catalogue.record(entry.name, verdict, says)
    return verdict


def _had(entry: catalogue.Entry, claim: Claim) -> dict[str, Any] | None:
    """The recorded verdict."""
    return next((one for one in entry.verdicts if one["says"] == claim.says), None)


def _stands(entry: catalogue.Entry, claim: Claim, had: dict[str, Any], says: Sequence[str], data: Path | None, log: Log) -> bool:
    """Whether a recorded verdict is one of the present code and models; where they have changed and the quick form gives the numbers that
    it gave, it is from now on."""
    ground = catalogue.ground(entry.name, claim.scale)
    if had.get("ground") != ground and had["scale"] == claim.scale and "witness" in had:
        log(f"{entry.name}: the quick form on the present code, for a verdict of earlier code: {claim.says}")
        witness, seconds = _witness(claim, data, log, had.get("witness_draws"))
        if _same(had["witness"], witness):
            had |= {"ground": ground, "confirmed": job.versions(), "witness_seconds": seconds}
            catalogue.record(entry.name, had, says)
    return had.get("ground") == ground  # type: ignore[no-any-return]


def _confirmed(entry: catalogue.Entry, claims: Sequence[Claim], data: Path | None, log: Log) -> list[dict[str, Any]]:
    """Recorded verdicts, those of earlier code put to the test of their quick forms."""
    says = [one.says for one in claims_of(entry.name)]
    found = []
    for claim in claims:
        if (had := _had(entry, claim)) is not None:
            stands = _stands(entry, claim, had, says, data, log)
            log(f"{entry.name}: {had['result']}, {'on the present code' if stands else 'of earlier code, not confirmed'}: {claim.says}")
            found.append(had)
    return found


def _witnessed(
    entry: catalogue.Entry, claim: Claim, verdict: dict[str, Any], says: Sequence[str], data: Path | None, log: Log
) -> dict[str, Any]:
    """A recorded verdict with the numbers of the quick form beside it."""
    if "witness" in verdict or verdict["result"] == "cannot be checked here":
        return verdict
    log(f"{entry.name}: the quick form, as a witness: {claim.says}")
    witness, seconds = _witness(claim, data, log, QUICK)
    verdict = verdict | {"witness": witness, "witness_draws": QUICK, "witness_seconds": seconds}
    catalogue.record(entry.name, verdict, says)
    return verdict


def _witness(claim: Claim, data: Path | None, log: Log, draws: int | None) -> tuple[dict[str, float], float]:
    """Numbers of a claim's quick form in so many of its draws (None: all), without its stand-in, and the seconds that it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
        verdict = claim.check(Lab(data, True, log, Path(scratch), draws))
    return {key: float(one.value) for key, one in verdict.numbers.items()}, round(time.monotonic() - began, 1)


def _same(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two witnesses have the same numbers, to a thousandth; times hardly ever do."""
    return bool(a) and a.keys() == b.keys() and all(math.isclose(a[key], b[key], rel_tol=1e-3) for key in a)


# ---- both


def _judge(name: str, claim: Claim, lab: Lab) -> dict[str, Any]:
    """A claim and its stand-in in a lab, which is given a scratch folder."""
    lab.log(f"{name}: {claim.says}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
        lab = lab._replace(scratch=Path(scratch))
        verdict = claim.check(lab)
        # where the claim cannot be checked, neither can its stand-in
        broken = claim.broken(lab) if verdict.result != "cannot be checked here" else verdict
    took = time.monotonic() - began
    lab.log(f"{name}: {verdict.result}" + (f" ({verdict.reason})" if verdict.reason else "") + f", in {took:.0f} s")
    made = {"seconds": round(took, 1), "versions": job.versions(), "hardware": measurement.hardware()}
    return {"says": claim.says, "where": asdict(claim.where), "scale": claim.scale, **_plain(verdict), "broken": _plain(broken), **made}


def _plain(verdict: Verdict) -> dict[str, Any]:
    def numbers(one: Measurement) -> dict[str, Any]:
        return {key: value for key, value in one._asdict().items() if value is not None}

    return {"result": verdict.result, "reason": verdict.reason, "numbers": {key: numbers(one) for key, one in verdict.numbers.items()}}
