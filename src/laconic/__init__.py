"""laconic: say the same with fewer weights.

`import laconic` brings neither torch nor transformers; what a name needs is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laconic import plugin

if TYPE_CHECKING:
    from laconic.api import Budget, advise, attend, bench, cache, compress, generate, load, measure, plan, report, select, verify

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "__version__",
    "advise",
    "attend",
    "bench",
    "cache",
    "compress",
    "generate",
    "load",
    "measure",
    "plan",
    "report",
    "select",
    "verify",
]

# lets transformers read laconic's folders from now on
plugin.on_import()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from laconic import api

        return getattr(api, name)
    raise AttributeError(f"module 'laconic' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
