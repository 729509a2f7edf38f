"""Train `denoiser`, a small text-conditioned diffusion model: `python -m laconic.zoo.denoiser --data FOLDER [--minutes M] [--out FOLDER]`.

A transformer over patches of a noisy digit (MNIST without its margin, halved to 12 x 12), which reads a caption through cross-attention in
every block, as the denoisers of text-to-image models do (Rombach et al. 2022, arXiv:2112.10752, section 3.3; Peebles & Xie 2023,
arXiv:2212.09748): "<start> a bold slanted seven <end> ...", 8 words, the first of which is the same in every caption. Minutes of one core.

What is predicted is the noise e of x = cos(a) x0 + sin(a) e, a = pi / 2 times the noise level (Ho et al. 2020, arXiv:2006.11239, eq. 14),
and it is given as the log-densities of a unit normal about it at 16 bins: the KL of two answers is half the squared difference of their
noise, in nats a pixel, so that a denoiser is judged as all else is.

`laconic compress laconic.zoo.denoiser:denoiser --data laconic.zoo.denoiser:calibrate --data-certify laconic.zoo.denoiser:certify` gives it
states of its own sampling, at all noise levels. `painter` is the same network as a generator of one step, from noise to an image, with
`drafts_to_calibrate` and `drafts_to_certify`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.kernels.densities import BINS, OUTERMOST, densities, means
from laconic.kernels.pairs import narrowly
from laconic.zoo import small

SIZE, PATCH, HIDDEN, INNER, LAYERS, HEADS = 12, 3, 64, 256, 3, 4
PIXELS, PATCHES = SIZE * SIZE, (SIZE // PATCH) ** 2
VOCABULARY = (
    *("<start>", "<end>", "a", "thin", "bold", "straight", "slanted"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
WORDS = 8
# how often an adjective is left out of a training caption, and how often all of it
SILENT, BLANK = 0.3, 0.1
# the least and the greatest noise level that sampling begins and ends with
LEAST, MOST = 0.02, 0.98
# frequencies of the noise level
WAVES = 16
# chains that each set of calibration inputs is taken from, and their steps
CHAINS, STEPS = 64, 32


def path() -> Path:
    """Return the folder of the shipped weights."""
    return small.path("denoiser")


class Attention(nn.Module):
    """Multi-head attention of hidden (b, t, d) over another sequence (b, s, d), or over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.value = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, over: Tensor) -> Tensor:
        q, k, v = (side.unflatten(-1, (HEADS, -1)).transpose(1, 2) for side in (self.query(hidden), self.key(over), self.value(over)))
        shares = self.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
        out: Tensor = self.out((shares @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Noise level, attention, attention over the words, feed-forward; each added to the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Linear(HIDDEN, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))
        self.attention, self.cross = Attention(), Attention()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: Tensor, level: Tensor, words: Tensor) -> Tensor:
        hidden = hidden + self.level(level)[:, None]
        inner = self.norms[0](hidden)
        hidden = hidden + self.attention(inner, inner)
        hidden = hidden + self.cross(self.norms[1](hidden), words)
        out: Tensor = hidden + self.down(F.gelu(self.up(self.norms[2](hidden))))
        return out


class Denoiser(nn.Module):
    """Inputs (b, pixels + 1 + words), one row an image, its noise level in 0 to 1 and its caption -> log-densities (b, pixels, bins) of the
    noise."""

    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), HIDDEN)
        self.places = nn.Parameter(0.02 * torch.randn(WORDS, HIDDEN))
        self.caption = nn.LayerNorm(HIDDEN)
        self.begin, self.level = nn.Linear(2 * WAVES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.patches = nn.Linear(PATCH * PATCH, HIDDEN)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, PATCH * PATCH)
        self.register_buffer("waves", 2.0 ** torch.linspace(0, 7, WAVES), persistent=False)
        nn.init.normal_(self.words.weight, std=1.0)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            for last in (block.attention.out, block.cross.out, block.down):  # type: ignore[union-attr]
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(3 * LAYERS))  # type: ignore[union-attr, arg-type]

    def noise(self, inputs: Tensor) -> Tensor:
        """The noise (b, pixels) that the inputs hold: sin(a) x + cos(a) times what is learned (Salimans & Ho 2022, arXiv:2202.00512)."""
        pixels, share, ids = inputs.split([PIXELS, 1, WORDS], 1)
        words = self.caption(self.words(ids.long()) + self.places)
        turned = share * self.waves
        level = F.silu(self.level(F.silu(self.begin(torch.cat([turned.sin(), turned.cos()], 1)))))
        side = SIZE // PATCH
        cut = pixels.reshape(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, PATCHES, PATCH * PATCH)
        hidden = self.patches(cut) + self.positions
        for block in self.blocks:
            hidden = block(hidden, level, words)
        out = self.head(self.norm(hidden)).reshape(-1, side, side, PATCH, PATCH).transpose(2, 3).reshape(-1, PIXELS)
        angle = share * (math.pi / 2)
        found: Tensor = angle.sin() * pixels + angle.cos() * out
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        """The log-densities, up to a number for each pixel."""
        return densities(self.noise(inputs))


class Painter(Denoiser):
    """The same network as a generator of one step: inputs of the highest noise level -> log-densities (b, pixels, bins) of the image that
    is seen in them."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The log-densities, up to a number for each pixel."""
        pixels, level, _ = inputs.split([PIXELS, 1, WORDS], 1)
        return densities(seen(pixels, self.noise(inputs), level))


def denoiser() -> Denoiser:
    """Return the shipped model in fp32. UserError where the package holds no weights."""
    return _filled(Denoiser())


def painter() -> Painter:
    """Return the shipped model in fp32 as a generator of one step. UserError where the package holds no weights."""
    return _filled(Painter())


Model = TypeVar("Model", bound=Denoiser)


def _filled(model: Model) -> Model:
    small.filled(model, path(), "denoiser")
    words, start = drawn(0, 2)
    model.example_input = joined(start, torch.full((2,), MOST), words)  # type: ignore[assignment]
    return model


# ---- captions and sampling


class Said(NamedTuple):
    """What captions say: digit (b,) 0 to 9, bold and slanted (b,) bool."""

    digit: Tensor
    bold: Tensor
    slanted: Tensor


def captions(said: Said, silent: Tensor | None = None) -> Tensor:
    """Word numbers (b, words) int64; silent (b, 3) bool: which of weight, slant and all are left out."""
    silent = torch.zeros(len(said.digit), 3, dtype=torch.bool) if silent is None else silent
    start, end, a, thin, straight, zero = (VOCABULARY.index(word) for word in ("<start>", "<end>", "a", "thin", "straight", "zero"))
    rows = []
    for digit, bold, slanted, (light, steep, mute) in zip(*(part.tolist() for part in (*said, silent)), strict=True):
        words = [a, *([] if light else [thin + bold]), *([] if steep else [straight + slanted]), zero + digit]
        row = [start, *([] if mute else words)]
        rows.append([*row, *[end] * (WORDS - len(row))])
    return torch.tensor(rows)


def joined(pixels: Tensor, level: Tensor, words: Tensor) -> Tensor:
    """pixels (b, pixels), levels (b,) and captions (b, words) as the model takes them."""
    return torch.cat([pixels, level[:, None], words.float()], 1)


def seen(pixels: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """The image (b, pixels) in pixels that hold so much noise, at levels that go with them."""
    angle = level * (math.pi / 2)
    return (pixels - angle.sin() * noise) / angle.cos()


def sampled(model: nn.Module, words: Tensor, start: Tensor, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and noise of each step of a chain from start (b, pixels) to an image, which comes last with zeros for noise (DDIM, Song et al.
    2020, arXiv:2010.02502, eq. 12, without chance); what is seen of the image is kept within its range."""
    x = start
    levels = torch.linspace(MOST, LEAST, steps)
    for number, level in enumerate(levels):
        inputs = joined(x, level.expand(len(x)), words)
        with torch.no_grad():
            noise = means(model(inputs))
        yield inputs, noise
        angle = level * (math.pi / 2)
        image = seen(x, noise, level).clamp(-1, 1)
        noise = (x - angle.cos() * image) / angle.sin()
        after = levels[number + 1] * (math.pi / 2) if number + 1 < steps else torch.zeros(())
        x = after.cos() * image + after.sin() * noise
    yield joined(x, torch.zeros(len(x)), words), torch.zeros_like(x)


def drawn(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Captions (count, words) of every digit in turn, and the noise (count, pixels) that chains begin with, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    bold, slanted = (torch.rand(2, count, generator=generator) < 0.5).unbind()
    silent = torch.rand(count, 3, generator=generator) < torch.tensor([SILENT, SILENT, 0.0])
    return captions(Said(torch.arange(count) % 10, bold, slanted), silent), torch.randn(count, PIXELS, generator=generator)


def states(seed: int, chains: int = CHAINS, steps: int = STEPS, model: nn.Module | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and noise, one for each step of the chains of a seed."""
    chain = sampled(denoiser() if model is None else model, *drawn(seed, chains), steps)
    return itertools.islice(chain, steps)


def calibrate() -> Iterator[tuple[Tensor, Tensor]]:
    """States of sampling, equally many of each noise level, to search and calibrate on, with the noise that the model sees in them."""
    return states(1)


def certify() -> Iterator[tuple[Tensor, Tensor]]:
    """States of other chains."""
    return states(2)


def drafts(seed: int, count: int = 256, batch: int = 64, model: nn.Module | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs of one step, noise alone and captions, and the images that a model makes of them."""
    model = painter() if model is None else model
    words, start = drawn(seed, count)
    for inputs in joined(start, torch.full((count,), MOST), words).split(batch):
        with torch.no_grad():
            yield inputs, means(model(inputs))


def drafts_to_calibrate() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of a painter to search and calibrate on."""
    return drafts(1)


def drafts_to_certify() -> Iterator[tuple[Tensor, Tensor]]:
    """Others."""
    return drafts(2)


for _data in (calibrate, certify, drafts_to_calibrate, drafts_to_certify):
    _data.metric = "kl"  # type: ignore[attr-defined]


# ---- training


class Digits(NamedTuple):
    """Images (n, pixels) uint8 and what captions say of them."""

    pixels: Tensor
    said: Said


def digits(folder: Path) -> tuple[Digits, Digits]:
    """Training and test digits from mnist.npz of a folder. Bold is more ink than in the middle one of its digit, slanted more shear."""
    parts = small.mnist(folder)
    looks = [_looks(images) for images, _ in parts]
    ends = [_middle(look, parts[0][1]) for look in looks[0]]
    first, second = (
        Digits(halved(images), Said(labels, *(look > end[labels] for look, end in zip(seen, ends, strict=True))))
        for (images, labels), seen in zip(parts, looks, strict=True)
    )
    return first, second


def halved(images: Tensor) -> Tensor:
    """(n, 28, 28) uint8 -> (n, pixels) uint8, means of 2 x 2 without a margin of 2."""
    return F.avg_pool2d(images[:, 2:-2, 2:-2].float(), 2).round().to(torch.uint8).flatten(1)


def _middle(look: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([look[labels == digit].median() for digit in range(10)])


def _looks(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image its ink, and how far it leans to the right a row."""
    ink = images.float()
    mass = ink.sum((1, 2)).clamp(min=1)
    at = torch.arange(images.shape[1]).float()
    y, x = (ink.sum(2) @ at / mass, ink.sum(1) @ at / mass)
    down, right = at - y[:, None], at - x[:, None]
    both = torch.einsum("nij,ni,nj->n", ink, down, right)
    return mass, -both / (ink.sum(2) * down.square()).sum(1).clamp(min=1)


def normal(pixels: Tensor) -> Tensor:
    """uint8 -> -1 to 1."""
    return pixels.float() / 127.5 - 1


def noisy(images: Digits, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, noise and images (b, pixels) of some digits, each at a level of its own and with words left out by chance."""
    clean = normal(images.pixels[index])
    noise = torch.randn(clean.shape, generator=generator)
    level = LEAST + (MOST - LEAST) * torch.rand(len(index), generator=generator)
    silent = torch.rand(len(index), 3, generator=generator) < torch.tensor([SILENT, SILENT, BLANK])
    words = captions(Said(*(part[index] for part in images.said)), silent)
    angle = level[:, None] * (math.pi / 2)
    return joined(angle.cos() * clean + angle.sin() * noise, level, words), noise, clean


def loss_of(model: Denoiser, inputs: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of what is learned, which is that of the noise divided by cos(a)^2."""
    cosine = (inputs[:, PIXELS : PIXELS + 1] * (math.pi / 2)).cos()
    return ((model.noise(inputs) - noise) / cosine).square().mean()


def held_out(model: Denoiser, images: Digits, count: int = 2048) -> float:
    """Mean squared error of the noise of test digits, per pixel."""
    generator, errors = torch.Generator().manual_seed(0), []
    for index in torch.arange(count).split(256):
        inputs, noise, _ = noisy(images, index, generator)
        with torch.no_grad():
            errors.append((model.noise(inputs) - noise).square().mean())
    return float(torch.stack(errors).mean())


def train(images: Digits, test: Digits, recipe: small.Briefly, minutes: float, scratch: Path, say: Any) -> tuple[Denoiser, dict[str, Any]]:
    """Train for so many minutes of the processor, as `small.by_minutes` does."""
    torch.manual_seed(0)
    model = Denoiser()

    def loss(generator: torch.Generator) -> Tensor:
        inputs, noise, _ = noisy(images, torch.randint(len(images.pixels), (recipe.batch,), generator=generator), generator)
        with narrowly():
            return loss_of(model, inputs, noise)

    run = small.by_minutes(model, loss, recipe, minutes, scratch, lambda: held_out(model, test, 256), say)
    return model.eval(), run


def write(model: Denoiser, run: dict[str, Any], test: Digits, folder: Path) -> dict[str, Any]:
    """Write weights in bf16, the card and the record, and return the record."""
    return small.write_module(model, Denoiser(), lambda stored: {"run": run, "losses": {"test": held_out(stored, test)}}, card, folder)


def card(record: dict[str, Any]) -> str:
    """Return the model card that states a training record."""
    run = record["run"]
    return f"""---
library_name: laconic
pipeline_tag: text-to-image
license: apache-2.0
tags: [laconic, diffusion, digits, denoiser]
images_seen: {run["images"]}
---
# denoiser

A small text-conditioned diffusion model of digits: a subject for methods that act on denoisers and on cross-attention.

## Architecture

A transformer over {PATCHES} patches of {PATCH} x {PATCH} pixels: {LAYERS} blocks of attention, cross-attention over the caption and
feed-forward, hidden {HIDDEN}, intermediate {INNER}, {HEADS} heads, {record["parameters"]:,} parameters stored in bf16. A caption has
{WORDS} of {len(VOCABULARY)} words, the first `<start>`, and ends in `<end>`. It answers with the log-densities of a unit normal about
the noise of each pixel, at {BINS} bins from {-OUTERMOST:g} to {OUTERMOST:g}.

## Data

MNIST, 60,000 digits of 28 x 28, without a margin of 2, halved. Captions say the digit and, three times in ten each left out, whether it is
bold and whether it is slanted, both against the middle one of its digit; one caption in ten says nothing.

## Training

{run["images"]:,} images in {run["minutes"]:.1f} minutes of one core, {run["batch"]} a step, noise levels even over {LEAST} to {MOST}.
AdamW (rate {run["rate"]}), gradient norm clipped at 1; linear warm-up, stable, linear decay to zero. It has seen few images, and an
under-trained model is easier to quantize than a finished one.

Retrain with `python -m laconic.zoo.denoiser --data FOLDER`, the folder of mnist.npz.

## Held-out loss

Mean squared error of the noise of 2,048 test digits: {record["losses"]["test"]:.4f} a pixel. Weights as stored (bf16), arithmetic in fp32.

## Intended use

A subject for compression methods, tests and demonstrations.

## Licence note

The weights come under laconic's licence, Apache-2.0. MNIST (LeCun, Cortes, Burges) comes under CC BY-SA 3.0 and is not part of the package.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    a = small.asked("denoiser", __doc__, arguments, minutes=5)
    images, test = digits(a.data)
    model, run = train(images, test, small.Briefly(), a.minutes, a.scratch, small.say)
    small.say(f"wrote {a.out}: {write(model, run, test, a.out)}")


if __name__ == "__main__":
    main()
