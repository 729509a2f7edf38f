"""The one training loop: learns Soft forms, or modules placed beside a model, so that what is computed with them meets its targets.

It knows no method and no model: what is learned are modules, how is a Lesson, and a model is a function of a batch's number and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from laconic.core.errors import UserError
from laconic.core.packed import Soft
from laconic.core.router import Routed
from laconic.core.transform import Lesson
from laconic.kernels.threads import threads

Run = Callable[[int, Mapping[str, Tensor]], Tensor]
Found = TypeVar("Found")


class Targets(Protocol):
    """What each batch must meet, read when it is needed."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Tensor: ...


class Signed(torch.optim.Optimizer):
    """Steps of one size along the sign of the gradient: w -= rate sign(g). Bernstein et al. 2018, arXiv:1802.04434, algorithm 1."""

    def __init__(self, params: Sequence[Mapping[str, object]]) -> None:
        super().__init__([dict(group) for group in params], {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below count for ever, each once in a pass, every pass in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def tune(
    run: Run,
    targets: Targets,
    forms: Mapping[str, nn.Module],
    lesson: Lesson,
    *,
    generator: torch.Generator,
    together: int = 1,
    lanes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Learns the forms in place, all together; returns the objective of each step, a mean over its passes, without the penalties of forms
    and routers. run(i, weights): output for batch i with these dense weights, by the names of the forms that are Soft, smaller ones where
    the lesson asks for the first slices (any other module is learned as it is, and `run` calls it itself); targets[i]: what it must
    meet. together: neighbouring batches that make a step, their gradients added one after another, so that one batch's activations are in
    memory; the objective is then their mean. lanes: where all forms are Soft, so many of these batches are run at once, in threads of
    their own that share the cores; `run` must allow it."""
    named = [(name.rpartition(".")[2], p) for form in forms.values() for name, p in form.named_parameters()]
    groups: list[dict[str, Any]] = [{"params": [p for name, p in named if name == learned], "lr": rate} for learned, rate in lesson.rates]
    groups = [group for group in groups if group["params"]]
    if not groups:
        have = ", ".join(sorted({name for name, _ in named})) or "nothing"
        said = ", ".join(name for name, _ in lesson.rates) or "nothing"
        raise UserError(f"{type(lesson).__name__} has rates for {said}, but what can be learned here is {have}: give rates for that")
    optimiser = _optimiser(groups, lesson)
    rates = [group["lr"] for group in optimiser.param_groups]
    every = [part for form in forms.values() for part in form.modules()]
    learned, routed = [part for part in every if isinstance(part, Soft)], [part for part in every if isinstance(part, Routed)]
    soft = {name: form for name, form in forms.items() if isinstance(form, Soft)}
    most = max((form.parts for form in soft.values()), default=1)
    abreast = Lanes(lanes) if lanes > 1 and len(soft) == len(forms) else None
    order = shuffled(-(-len(targets) // together), generator)
    found = []
    for step in range(lesson.steps):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * _decayed(lesson, step)
        optimiser.zero_grad(set_to_none=True)
        first = next(order) * together
        batches = range(first, min(first + together, len(targets)))
        losses = []
        for number, count in enumerate(lesson.prefixes(most, generator)):
            weights = {name: (form.first(count) if count < form.parts else form).dense() for name, form in soft.items()}
            # the forms' own graph is gone through once, with what all batches say of the dense weights
            leaves = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in weights.items()}
            if abreast is not None:
                losses += _slopes(abreast, partial(_missed, run, targets, lesson, leaves), batches, list(leaves.values()))
            else:
                for i in batches:
                    loss = _missed(run, targets, lesson, leaves, i)
                    losses.append(float(loss.detach()))
                    # one pass after another, so that no two graphs are in memory
                    sum(_penalties(routed, step, lesson) if not number else [], loss).div(len(batches)).backward()
            asked = [name for name, leaf in leaves.items() if leaf.grad is not None]
            penalties = _penalties(learned, step, lesson) if not number else []
            if asked or penalties:
                grads = [leaves[name].grad for name in asked]
                torch.autograd.backward([weights[name] for name in asked] + penalties, [*grads, *(None for _ in penalties)])
        optimiser.step()
        for form in learned:
            form.settle()
        found.append(sum(losses) / len(losses))
        progress(step + 1, lesson.steps)
    return found


def _missed(run: Run, targets: Targets, lesson: Lesson, weights: Mapping[str, Tensor], i: int) -> Tensor:
    return lesson.objective(run(i, weights), targets[i], None)


class Lanes:
    """Calls that run at once, each in a thread of its own with its share of torch's: small products gain more so than divided."""

    def __init__(self, count: int) -> None:
        self.count, self.pool = count, ThreadPoolExecutor(count)

    def __call__(self, job: Callable[[int], Found], items: Sequence[int]) -> Iterator[Found]:
        """What the job gives for each item, in their order."""
        with threads(max(1, torch.get_num_threads() // self.count)):
            yield from self.pool.map(job, items)


def _slopes(lanes: Lanes, loss_of: Callable[[int], Tensor], batches: Sequence[int], leaves: Sequence[Tensor]) -> list[float]:
    """The objective of each batch. Gradients of their mean are added up in the batches' order, whichever ends first, so that a run is
    the same each time."""
    asked = [leaf for leaf in leaves if leaf.requires_grad]

    def job(i: int) -> tuple[float, Sequence[Tensor | None]]:
        loss = loss_of(i)
        return loss.item(), torch.autograd.grad(loss / len(batches), asked, allow_unused=True)

    losses = []
    for loss, slopes in lanes(job, batches):
        losses.append(loss)
        for leaf, slope in zip(asked, slopes, strict=True):
            if slope is not None:
                leaf.grad = slope if leaf.grad is None else leaf.grad + slope
    return losses


def _penalties(parts: Sequence[Soft | Routed], step: int, lesson: Lesson) -> list[Tensor]:
    return [penalty for part in parts if (penalty := part.penalty(step / lesson.steps)) is not None]


def _optimiser(groups: list[dict[str, Any]], lesson: Lesson) -> torch.optim.Optimizer:
    if lesson.optimiser == "signed":
        return Signed(groups)
    if lesson.optimiser == "momentum":
        # a rate for each group
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)


def _decayed(lesson: Lesson, step: int) -> float:
    done = step / max(1, lesson.steps)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[lesson.decay]
