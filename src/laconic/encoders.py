"""transformers' classes that no row of data describes (encoders, vision, speech, encoder-decoders) as modules of one input and one answer.

A walk, a trace and a comparison call `module(inputs)` and read logits: after `feed` these classes can be called so. What a user loads is
not fed: it is called as transformers says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laconic.core.errors import UserError

# names that transformers gives to what a model is mainly fed with
MAIN = ("pixel_values", "input_features", "input_values", "input_ids")
# what is read of an output, the first that is there
ANSWERS = ("logits", "logits_per_image", "logits_per_text")


def class_of(name: str) -> Any | None:
    """transformers' class of a name in `architectures`; None where it knows none."""
    import transformers

    found = getattr(transformers, name, None)
    return found if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel) else None


class Feed:
    """Hooks around a class of transformers. given: further inputs, the same for every sample; one whose first size is 1 is repeated for
    each row of a batch, and floating inputs take the model's dtype.

    Rows that hold the padding token get a mask. An encoder-decoder is shown its start token unless `decoder_input_ids` is given, and
    answers with the logits of the next token."""

    def __init__(self, model: Any, given: Mapping[str, Tensor]) -> None:
        self.given = dict(given)
        self.name = type(model).__name__
        takes = inspect.signature(model.forward).parameters
        if unknown := [name for name in given if name not in takes]:
            raise UserError(f"{self.name} takes no input {unknown[0]!r}, which the data's attribute `given` holds: correct its name")
        self.main = next((n for n in (model.main_input_name, *MAIN) if n in takes and n not in given), model.main_input_name)
        self.fixed = {"use_cache": False} if "use_cache" in takes else {}
        config = model.config
        self.decodes = bool(getattr(config, "is_encoder_decoder", False))
        self.pad = getattr(config, "pad_token_id", None) if self.main == "input_ids" and "attention_mask" in takes else None
        self.start = getattr(config, "decoder_start_token_id", None) if self.decodes else None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """One input by position becomes all that the class needs; any other call stays as it is."""
        if len(args) != 1:
            return None
        (x,) = args
        given = {name: value.to(x.device) for name, value in self.given.items()}
        fed = {**self.fixed, **{k: v.expand(len(x), *v.shape[1:]) if len(v) == 1 else v for k, v in given.items()}, **kwargs}
        fed[self.main] = x.to(module.dtype) if x.is_floating_point() else x
        if self.pad is not None and "attention_mask" not in fed and bool((x == self.pad).any()):
            fed["attention_mask"] = x.ne(self.pad).long()
        if self.start is not None and not {"decoder_input_ids", "labels"} & set(fed):
            fed["decoder_input_ids"] = torch.full((len(x), 1), self.start, dtype=torch.int64, device=x.device)
        return (), fed

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
        """The logits."""
        found = next((value for name in ANSWERS if isinstance(value := getattr(out, name, None), Tensor)), None)
        if found is None:
            raise UserError(
                f"{self.name} gives no logits, so there is nothing to compare: give a class with a head "
                "(ForSequenceClassification, ForImageClassification ...), or the model as package.module:function"
            )
        return found[:, -1] if self.decodes and found.dim() == 3 else found


def feed(model: Any, given: Mapping[str, Tensor]) -> None:
    """Let `model`, once and for good, be called with one input and answer with logits."""
    hooks = Feed(model, given)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, with_kwargs=True)
