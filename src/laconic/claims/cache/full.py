"""The claim of the full cache: nothing is lost by keeping keys and values instead of computing them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from laconic.claims.lab import Misread, continued, judged, long_text
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.state import State
from laconic.methods.cache.store.full import Full


def _same(lab: Lab, make: Callable[[], State]) -> Verdict:
    """Losses of the last tokens, decoded one by one, against one pass over the whole sequence."""
    model, rows = long_text()
    rows = rows[: 2 if lab.quick else 8, :320]
    with torch.inference_mode():
        logits = model(rows, use_cache=False).logits[:, 255:-1].float()
    whole = F.cross_entropy(logits.flatten(0, 1), rows[:, 256:].flatten(), reduction="none").reshape(rows.shape[0], -1)
    found = continued(make, rows, 256)
    worst = float((found.nll - whole).abs().max())
    n = whole.numel()
    numbers = {
        "greatest difference in loss": Measurement(worst, "nats", n),
        "loss, whole sequences at once": Measurement(float(whole.mean()), "nats/token", n),
        "loss, token by token": Measurement(float(found.nll.mean()), "nats/token", n),
    }
    return judged([] if worst < 1e-3 else [f"a token's loss differs by {worst:.2g} nats"], numbers)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Decoding token by token from cached keys and values gives the losses of one pass over the whole sequence, to rounding.",
        where=Paper("Shazeer", 2019, "arXiv:1911.02150", "section 2.4"),
        scale="nano in fp32, 64 tokens after 256 of held-out text, 2 rows (in full 8); no chance in it",
        check=partial(_same, make=Full),
        # late keys as well would change nothing: attention does not look at places
        broken=partial(_same, make=partial(Misread, Full(), "values")),
    ),
)
