"""Where tensors are made and computed: on the processor, or, inside `on`, on another device of torch.

What is read from files and what is drawn from a generator is made by the processor and then moved, so that a file, and a seed, mean the
same on every device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
Make = TypeVar("Make", bound=Callable[..., Any])
# what makes a tensor out of nothing but sizes and numbers
MAKES = frozenset({
    torch.arange, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.rand,
    torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
})  # fmt: skip

# of the process, not of a thread: gradients of another device come in threads of their own
_now = [CPU]


def device() -> torch.device:
    """Where tensors are made now."""
    return _now[-1]


def here(tensor: Tensor) -> Tensor:
    """The tensor where it is computed with now; itself if it is there."""
    return tensor.to(device())


@contextmanager
def on(where: torch.device | str) -> Iterator[None]:
    """Within, tensors are made on a device, but for those whose device is said. One within another: the inner one holds."""
    where = torch.device(where)
    # nothing is watched where nothing would be changed
    watch: AbstractContextManager[object] = nullcontext() if where == device() == CPU else _Mode(where)
    _now.append(where)
    try:
        with watch:
            yield
    finally:
        _now.pop()


def kept(make: Make) -> Make:
    """A function whose tensors (one, or a tuple of them) are made once for each argument, by the processor, and given where they are
    computed with. Not to be written to."""

    @lru_cache(maxsize=64)
    def made(*args: Hashable) -> Any:
        with torch.inference_mode(False), on(CPU):
            return make(*args)

    @wraps(make)
    def given(*args: Hashable) -> Any:
        found = made(*args)
        return tuple(map(here, found)) if isinstance(found, tuple) else here(found)

    return cast(Make, given)


class _Mode(TorchFunctionMode):
    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if generator is not None and generator.device != self.where:
            return _drawn(func, args, kwargs, self.where)
        if func in MAKES:
            where = kwargs.get("device") or self.where
            if func is torch.tensor:
                # numbers of the interpreter are the processor's
                return func(*args, **kwargs | {"device": CPU}).to(where)
            kwargs["device"] = where
        return func(*args, **kwargs)


def _drawn(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], where: torch.device) -> Any:
    """What a function draws from a generator of the processor's, moved to a device; numbers drawn into a tensor are copied there."""
    if func in MAKES:
        return func(*args, **kwargs | {"device": CPU}).to(kwargs.get("device") or where)
    if getattr(func, "__name__", "").endswith("_"):
        into = args[0] if args else kwargs.pop("tensor")
        with torch.no_grad():
            return into.copy_(func(torch.empty_like(into, device=CPU, requires_grad=False), *args[1:], **kwargs))
    given = [value.to(CPU) if isinstance(value, Tensor) else value for value in args]
    return func(*given, **kwargs).to(where)
