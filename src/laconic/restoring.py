"""A model whose weights were moved so that few bits hold it better, before anything of it is priced: quantization preprocessing.

A stage before all others, as a cut is: the recipe is followed once, the compressed weights, or corrections of them, learn to give the
original's predictions, and what they are then, dense, is taken for the model from then on. It is a worse model than the original in full
precision, and one that lies nearer to what can be stored; everything is still measured against the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from laconic.calibration import kept_tensor
from laconic.core.errors import UserError
from laconic.core.packed import Dense, Soft
from laconic.core.site import Anatomy
from laconic.core.transform import Lesson, Model
from laconic.data import Split
from laconic.journal import Below, Work
from laconic.models import Derived, Source
from laconic.pipeline import TUNABLE, Log, Progress, apply_plan, calibration_rows, learn_whole, make_plan, tune_plan
from laconic.recipe import Recipe, build


class Restored(Derived):
    """A model some of whose weights are those of a finished stage."""

    def __init__(self, original: Source, tensors: Mapping[str, Tensor]) -> None:
        Derived.__init__(self, original)
        self.moved = dict(tensors)
        self.infos = {
            name: info._replace(dtype=self.moved[name].dtype, file="", start=0, stop=self.moved[name].nbytes)
            if name in self.moved
            else info
            for name, info in original.infos.items()
        }

    @property
    def anatomy(self) -> Anatomy:
        return self.original.anatomy

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.moved:
            return self.original.read_rows(name, start, stop)
        return self.moved[name][start:stop].clone()

    def skeleton(self) -> nn.Module:
        return self.original.skeleton()


def restore(
    source: Source, split: Split, recipe: Recipe, budget: Sequence[str], *, seed: int, work: Work, progress: Progress, log: Log
) -> Source:
    """The model as it is, or after the lesson that `recipe.restore` names; journalled, the first compression stage by stage."""
    if recipe.restore is None:
        return source
    if source.parameters > TUNABLE:
        raise UserError(
            f"recipe {recipe.name} moves all weights together before it begins, in memory, and is for {TUNABLE:,} of them at most; this "
            "model has more: take `restore` out of a copy of the recipe"
        )
    if (value := work.done("restored")) is None:
        value, tensors = _learned(source, split, recipe, budget, seed, Below(work, "before"), progress, log)
        work.finish("restored", value, tensors)
        log(value["said"])
    restored = Restored(source, work.tensors("restored"))
    restored.notes = tuple(dict.fromkeys((*restored.notes, value["said"])))
    return restored


def merged(soft: Soft) -> Dense:
    """What a form is as it stands, dense."""
    return Dense(kept_tensor(soft.dense().detach()))


def _learned(
    source: Source, split: Split, recipe: Recipe, budget: Sequence[str], seed: int, work: Any, progress: Progress, log: Log
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The recipe followed once, and the weights that the lesson makes of it."""
    lesson: Lesson = build(str(recipe.restore))
    first = recipe.model_copy(update={"restore": None})
    if (journalled := work.done("plan")) is None:
        journalled = {"plan": make_plan(source, split, first, budget, seed=seed, work=work, progress=progress, log=log)}
        work.finish("plan", journalled)
    inputs = calibration_rows(source, split)
    applied = apply_plan(source, inputs, journalled["plan"], work=work, progress=progress, prefix="first")
    if recipe.tune is not None and not isinstance((tune := build(recipe.tune)).scope, Model):
        applied = tune_plan(source, calibration_rows(source, split, tune), applied, tune, seed=seed, work=work, progress=progress)
    forms, said = learn_whole(source, inputs, applied, lesson, seed=seed, work=work, progress=progress, teacher=source, end=merged)
    tensors = {name: kept_tensor(form.dense().reshape(source.infos[name].shape)) for name, form in forms.items()}
    return {"said": f"{len(tensors)} matrices moved before anything else, {said}"}, tensors
