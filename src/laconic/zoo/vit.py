"""Train `vit`, a small vision transformer: `python -m laconic.zoo.vit --data FOLDER [--minutes M] [--out FOLDER]`.

transformers' ViT (Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.1) on MNIST: 49 patches of 4 x 4 pixels and a class token. Minutes
of one core. It takes images as `normal` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.kernels.pairs import narrowly
from laconic.zoo import small

SIZE, PATCH, HIDDEN, INNER, LAYERS, HEADS, CLASSES = 28, 4, 64, 128, 3, 4, 10


def path() -> Path:
    """Return the folder of the shipped weights."""
    return small.path("vit")


def blank() -> nn.Module:
    """Return the model with weights that were drawn."""
    from transformers import ViTConfig, ViTForImageClassification

    sides: Any = {"image_size": SIZE, "patch_size": PATCH, "num_channels": 1, "num_labels": CLASSES}
    sizes: Any = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return ViTForImageClassification(ViTConfig(layer_norm_eps=1e-6, **sides, **sizes))


def vit() -> nn.Module:
    """Return the shipped model in fp32: (b, 1, 28, 28) -> (b, 10). UserError where the package holds no weights."""
    model = small.filled(blank(), path(), "vit")
    model.example_input = torch.zeros(2, 1, SIZE, SIZE)  # type: ignore[assignment]
    return model


def normal(images: Tensor) -> Tensor:
    """(n, 28, 28) uint8 -> (n, 1, 28, 28), -1 to 1."""
    return (images.float() / 127.5 - 1)[:, None]


def moved(images: Tensor, generator: torch.Generator, far: int = 2) -> Tensor:
    """Each of (n, h, w) uint8 moved by as much as `far` pixels, by chance."""
    padded = F.pad(images, (far,) * 4)
    down, right = torch.randint(2 * far + 1, (2, len(images)), generator=generator)
    side = torch.arange(images.shape[-1])
    return padded[torch.arange(len(images))[:, None, None], (down[:, None] + side)[:, :, None], (right[:, None] + side)[:, None]]


def right(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float(
            sum((model(normal(x)).logits.argmax(1) == y).sum() for x, y in zip(images.split(500), classes.split(500), strict=True))
            / len(images)
        )


def train(
    images: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], recipe: small.Briefly, minutes: float, scratch: Path, say: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Train for so many minutes of the processor, as `small.by_minutes` does."""
    torch.manual_seed(0)
    model = blank().train()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images[0]), (recipe.batch,), generator=generator)
        with narrowly():
            return F.cross_entropy(model(normal(moved(images[0][index], generator))).logits, images[1][index])

    run = small.by_minutes(model, loss, recipe, minutes, scratch, lambda: right(model, test[0][:1000], test[1][:1000]), say)
    return model.eval(), run


def write(model: nn.Module, run: dict[str, Any], test: tuple[Tensor, Tensor], folder: Path) -> dict[str, Any]:
    """Write weights in bf16, the card and the record, and return the record."""
    return small.write_module(model, blank(), lambda stored: {"run": run, "right": {"test": right(stored, *test)}}, card, folder)


def card(record: dict[str, Any]) -> str:
    """Return the model card that states a training record."""
    run = record["run"]
    return f"""---
library_name: laconic
pipeline_tag: image-classification
license: apache-2.0
tags: [laconic, vit, digits]
images_seen: {run["images"]}
---
# vit

A small vision transformer of digits: a subject for methods that act on encoders and on attention without a cache.

## Architecture

transformers' ViT over {(SIZE // PATCH) ** 2} patches of {PATCH} x {PATCH} pixels and a class token: {LAYERS} layers, hidden {HIDDEN}, \
intermediate {INNER},
{HEADS} heads, {record["parameters"]:,} parameters stored in bf16. Pixels are -1 to 1.

## Data

MNIST, 60,000 digits of 28 x 28, each moved by up to 2 pixels.

## Training

{run["images"]:,} images in {run["minutes"]:.1f} minutes of one core, {run["batch"]} a step. AdamW (rate {run["rate"]}), gradient norm \
clipped at 1; linear
warm-up, stable, linear decay to zero.

Retrain with `python -m laconic.zoo.vit --data FOLDER`, the folder of mnist.npz.

## Held-out digits

{record["right"]["test"]:.2%} of the 10,000 test digits right. Weights as stored (bf16), arithmetic in fp32.

## Intended use

A subject for compression methods, tests and demonstrations.

## Licence note

The weights come under laconic's licence, Apache-2.0. MNIST (LeCun, Cortes, Burges) comes under CC BY-SA 3.0 and is not part of the package.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    a = small.asked("vit", __doc__, arguments, minutes=12)
    images, test = small.mnist(a.data)
    model, run = train(images, test, small.Briefly(rate=0.002), a.minutes, a.scratch, small.say)
    small.say(f"wrote {a.out}: {write(model, run, test, a.out)}")


if __name__ == "__main__":
    main()
