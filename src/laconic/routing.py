"""Where a model is routed, and what that will cost: all but the learning itself, which is the pipeline's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laconic.artifact import put
from laconic.core.errors import UserError
from laconic.core.router import Routed, Router
from laconic.core.site import Conv, Site, Sublayer
from laconic.measurement import load_of, outputs, said

# rows of text, or images, that a cost is counted on before anything has learned
FORESEEN = {"text": 8, "classify": 512}


def sites(source: Any, router: Router) -> list[Site]:
    """The places that a router is offered, in order of execution."""
    offered = [*source.anatomy.sublayers()] if Sublayer in router.acts_on else []
    return offered + [site for site in source.anatomy.sites() if isinstance(site.kind, router.acts_on)]


def parts_of(source: Any, router: Router, model: nn.Module, example: Tensor | None = None) -> tuple[dict[str, Routed], list[str]]:
    """Parts by path, own parameters on meta, and notes on what stays as it is. model: filled or not; with an example of its inputs, which
    only a filled one can run, parts know also what a run alone can say. UserError where there are none."""
    placed: dict[str, Routed] = {}
    notes: list[str] = []
    for site in sites(source, router):
        if example is not None and isinstance(site.kind, Conv):
            site = site._replace(context={**site.context, "rectified": rectified(model, site, example)})
        change = router.place(site, source.anatomy)
        notes += change.notes
        for path, part in change.place.items():
            if isinstance(part, Routed) and part.fits(path, model):
                placed[path] = part
            else:
                notes.append(f"{path} cannot be run in parts and stays as it is")
    if not placed:
        why = f" ({notes[0]})" if notes else ""
        raise UserError(f"{type(router).__name__} finds nothing to route in {source.spec or 'this model'}{why}; take another recipe")
    return placed, notes


def rectified(model: nn.Module, site: Site, example: Tensor) -> bool:
    """Whether what is negative behind a site, and behind its norm, is nothing to the model: found by trying."""
    norms = site.context.get("norms", ())
    module = model.get_submodule(norms[0] if len(norms) == 1 else site.name)
    run = outputs(model)
    with torch.inference_mode():
        before = run(example)
        hook = module.register_forward_hook(lambda module, args, output: output.relu())
        try:
            return torch.equal(run(example), before)
        finally:
            hook.remove()


def install(model: nn.Module, parts: Mapping[str, Routed]) -> None:
    """Each part in the place of the module that it stands around."""
    for path, part in parts.items():
        put(model, path, part)


@contextlib.contextmanager
def asking(parts: Iterable[Routed], run: Any, asks: Any) -> Iterator[None]:
    """Inside, parts run so and are told so."""
    before = [(part, part.run, part.asks) for part in parts]
    for part, _, _ in before:
        part.run, part.asks = run, asks
    try:
        yield
    finally:
        for part, was, asked in before:
            part.run, part.asks = was, asked


def foreseen(source: Any, inputs: Tensor, router: Router, batch: int) -> dict[str, Any]:
    """What the routed model will take, counted before anything has learned: the original runs with labels in place of routers' words."""
    model = source.load(torch.float32)
    parts, notes = parts_of(source, router, model, inputs[:2])
    install(model, parts)
    begin(parts, 0)
    rows = inputs[: FORESEEN[source.task]]
    with asking(parts.values(), "masked", "labels"):
        load, seen = load_of(model, rows.split(batch), source.task)
    return {**said(load, seen, source.task), "notes": notes}


def begin(parts: Mapping[str, Routed], seed: int) -> None:
    """Values of routers that have learned nothing, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts.values():
        part.begin(generator)
