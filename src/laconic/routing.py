"""Where a model is routed, and what that will cost: all but the learning itself, which is the pipeline's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.artifact import put
from laconic.core.errors import UserError
from laconic.core.router import Routed, Router, asking
from laconic.core.site import Conv, Site, Sublayer
from laconic.kernels.place import here
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


def foreseen(source: Any, inputs: Tensor, router: Router, batch: int) -> dict[str, Any]:
    """What the routed model will take, counted before anything has learned: the original runs with labels in place of routers' words."""
    model, inputs = source.load(torch.float32), here(inputs)
    parts, notes = parts_of(source, router, model, inputs[:2])
    install(model, parts)
    begin(parts, 0)
    rows = inputs[: FORESEEN[source.task]]
    look(model, parts, rows.split(batch))
    with asking(parts.values(), "masked", "labels"):
        load, seen = load_of(model, rows.split(batch), source.task)
    return {**said(load, seen, source.task), "notes": notes}


def look(
    model: nn.Module, parts: Mapping[str, Routed], batches: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> None:
    """Parts see the data as often as they want, the model running as it was."""
    run, looks = outputs(model), max(part.looks for part in parts.values())
    with asking(parts.values(), "looking", "all"), torch.inference_mode():
        for turn in range(looks):
            for i, batch in enumerate(batches):
                run(batch)
                if progress is not None:
                    progress(turn * len(batches) + i + 1, looks * len(batches))
            for part in parts.values():
                part.looked()


def begin(parts: Mapping[str, Routed], seed: int) -> None:
    """Values of routers that have learned nothing, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts.values():
        part.begin(generator)
