"""Writes docs/verdicts.md: every claim of every method with the verdict that `laconic verify --full` recorded in the package.

python -m bench.verdicts"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from laconic import catalogue
from laconic.core.claim import Claim
from laconic.verifying import claims_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verdicts.md"
EARLIER = " (*earlier code*)"
HEAD = """# Verdicts

What the methods promise, and what was found when `laconic verify NAME --full` ran it here: several seeds, equal bytes or equal steps, a
broken stand-in beside it that has to fail. A claim that fails is a paper's promise that does not hold at this scale, or that we did not
reach. All figures: `laconic show NAME --json`, and [src/laconic/verdicts](../src/laconic/verdicts). *earlier code*: found before code
that the verdict stands on, or the model, last changed, and not confirmed since by the quick form. Written by `python -m bench.verdicts`.
"""


def page() -> str:
    """The whole page."""
    rows = [(entry, list(told(entry))) for entry in catalogue.entries()]
    results = [result for _, claims in rows for _, result, _ in claims]
    counts = f"{results.count('holds')} claims hold, {results.count('fails')} fail, {results.count('')} were not run in full yet."
    lines = [HEAD, counts]
    for family, members in groupby(rows, key=lambda row: row[0].family):
        lines.append(f"\n## {family}\n\n| method | claim | verdict |\n| --- | --- | --- |")
        for entry, claims in members:
            lines += [f"| {f'`{entry.name}`' if not i else ''} | {says} | {words} |" for i, (says, _, words) in enumerate(claims)]
    return "\n".join(lines) + "\n"


def told(entry: catalogue.Entry) -> Iterator[tuple[str, str, str]]:
    """Each claim of a method: what it says, its result ("" where there is none), and the result in words."""
    recorded = {verdict["says"]: verdict for verdict in entry.verdicts}
    for claim in claims_of(entry.name):
        verdict = recorded.get(claim.says)
        yield f"{escaped(claim.says)} *{escaped(claim.scale)}*", verdict["result"] if verdict else "", words(entry.name, claim, verdict)


def words(name: str, claim: Claim, verdict: dict[str, Any] | None) -> str:
    """A verdict in a cell."""
    if verdict is None:
        return "not run in full yet"
    said = verdict["result"] if verdict["result"] == "holds" else f"**{verdict['result']}**: {escaped(verdict['reason'])}"
    if verdict["broken"]["result"] == "holds":
        said += "; **and so does its broken stand-in**"
    return said + ("" if verdict.get("ground") == catalogue.ground(name, claim.scale) else EARLIER)


def escaped(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
