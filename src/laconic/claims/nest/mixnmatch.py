"""Claim of Mix'n'Match: models between two nested widths that were never trained, against the line between those that were."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from laconic.claims.lab import ONE, SEEDS, judged, spread
from laconic.claims.nest.matformer import LAYERS, PAPER, SCALE, families, path
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict


def _on_the_line(lab: Lab, seeds: Sequence[int], apart: bool) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    found = families(lab, lab.draws(seeds))
    for i, counts in enumerate(path()):
        low = i // LAYERS * LAYERS
        if i == low:
            continue
        above = []
        for one in found:
            points = one.stitched if apart else one.mixed
            done = (one.feed[i] - one.feed[low]) / (one.feed[low + LAYERS] - one.feed[low])
            line = points[low].loss + done * (points[low + LAYERS].loss - points[low].loss)
            above.append(points[i].loss / line - 1)
        numbers[f"slices {counts}: loss over the line"] = spread(above, "share")
        if statistics.fmean(above) > 0.005:
            wrong.append(f"slices {counts} lie above the line between their neighbours")
    return judged(wrong, numbers)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Mix'n'Match models lie on or below the line between neighbouring widths in loss against parameters, to within 0.5 %.",
        where=Paper("Devvrit et al.", 2024, PAPER, "sections 3.3 and 4.1"),
        scale=SCALE + "; the stand-in takes layers of models that learned apart",
        check=partial(_on_the_line, seeds=SEEDS, apart=False),
        broken=partial(_on_the_line, seeds=ONE, apart=True),
    ),
)
