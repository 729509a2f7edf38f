"""The one exception a user may see without a traceback: one sentence with the value, the bound and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's input or machine stands in the way; the message is one sentence that ends with the cure. Exit code 2."""


class BrokenPromise(Exception):
    """The work ran, but a promise does not hold (the reloaded artifact differs, a verdict fails). Exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A half-sentence that suggests the nearest known names: `; did you mean 'gptq'?` or the list of what exists."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(options)}"
