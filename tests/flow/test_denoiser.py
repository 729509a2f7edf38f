"""A small text-conditioned denoiser through compress: DGQ with its maps, and floats, on one that has learned nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laconic import artifact
from laconic.core.errors import UserError
from laconic.core.site import Linear
from laconic.data import Samples, Split, open_data
from laconic.job import compress
from laconic.kernels.densities import densities, means
from laconic.measurement import outputs
from laconic.methods.quantize.round.dgq import Powers, Spanned
from laconic.methods.quantize.round.fpquant import Floating
from laconic.methods.quantize.round.mixdq import Ranged
from laconic.models import ModuleSource, open_model
from laconic.recipe import load_recipe
from laconic.zoo import denoiser


def blank() -> denoiser.Denoiser:
    """As the factory returns it, with weights that were drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = denoiser.Denoiser()
        torch.nn.init.normal_(model.head.weight, std=0.1)
    words, start = denoiser.drawn(0, 2)
    model.example_input = denoiser.joined(start, torch.full((2,), denoiser.MOST), words)  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def opened() -> tuple[ModuleSource, Split]:
    source = ModuleSource("test_denoiser:blank", blank())
    pairs = [[torch.cat(part) for part in zip(*denoiser.states(seed, 10, 4, source.module), strict=True)] for seed in (1, 2)]
    parts = [Samples(x, y, 1, len(x), "") for x, y in (pairs[0], pairs[1], pairs[1])]
    return source, Split(*parts, {"kind": "pairs"}, "kl")


def test_its_answers_are_noise_and_their_kl_its_squared_difference(opened: tuple[ModuleSource, Split]) -> None:
    x = opened[1].certify.inputs
    model = blank()
    noise = model.noise(x)
    torch.testing.assert_close(means(model(x)), noise, rtol=1e-4, atol=1e-4)
    near = noise.clamp(-0.5, 0.5)
    p, q = ((densities(value).log_softmax(-1)) for value in (near, near + 0.3))
    torch.testing.assert_close((p.exp() * (p - q)).sum(-1), torch.full_like(near, 0.045), rtol=0.05, atol=0)


def test_states_are_of_all_levels(opened: tuple[ModuleSource, Split]) -> None:
    x = opened[1].calibrate.inputs
    level = x[:, denoiser.PIXELS]
    assert float(level.min()) == pytest.approx(denoiser.LEAST) and float(level.max()) == pytest.approx(denoiser.MOST)
    words = x[:, denoiser.PIXELS + 1 :].long()
    assert (words[:, 0] == denoiser.VOCABULARY.index("<start>")).all() and int(words.max()) < len(denoiser.VOCABULARY)
    said = denoiser.captions(denoiser.Said(torch.tensor([7]), torch.tensor([True]), torch.tensor([False])))
    assert " ".join(denoiser.VOCABULARY[i] for i in said[0]) == "<start> a bold straight seven <end> <end> <end>"


def test_the_trace_knows_blocks_and_maps(opened: tuple[ModuleSource, Split]) -> None:
    anatomy = opened[0].anatomy
    assert [segment.name for segment in anatomy.segments()] == ["blocks.0", "blocks.1", "blocks.2", ""]
    maps = {site.name: site.context["map"] for site in anatomy.sites() if "map" in site.context}
    assert {name: found.crossed for name, found in maps.items() if name.startswith("blocks.1")} == {
        "blocks.1.attention.out": False,
        "blocks.1.cross.out": True,
    }
    assert next(s for s in anatomy.sites() if s.name == "blocks.1.cross.key").context["positions"] == denoiser.WORDS
    outside = {site.name for site in anatomy.sites() if site.context.get("outside")}
    assert outside == {f"blocks.{i}.{name}" for i in range(3) for name in ("level", "cross.key", "cross.value")}


@pytest.mark.parametrize(("name", "form"), [("dgq", Spanned), ("fp-quant-w8a8", Floating), ("mixdq", Ranged)])
def test_it_is_compressed_and_read_back(
    opened: tuple[ModuleSource, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: type
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    source, split = opened
    found = compress(source, split, budget=[], recipe=load_recipe(name), out=tmp_path / "out", log=lambda _: None)
    assert found["reload"]["difference"] <= 1e-4
    model = artifact.load(tmp_path / "out")
    held = [layer.weight for layer in model.modules() if hasattr(layer, "weight") and isinstance(layer.weight, form)]
    assert len(held) == len(list(source.anatomy.sites(Linear)))
    placed = [path for path, module in model.named_modules() if isinstance(module, Powers)]
    assert placed == ([f"blocks.{i}.cross.softmax" for i in range(3)] if name == "dgq" else [])
    x = split.certify.inputs[:8]
    with torch.no_grad():
        near, original = (means(outputs(one)(x)) for one in (model, source.load(torch.float32)))
    assert 0 < float((near - original).norm()) < 0.5 * float(original.norm())


def drawing() -> denoiser.Painter:
    """A painter that has learned nothing."""
    model = denoiser.Painter()
    model.load_state_dict(blank().state_dict())
    model.example_input = blank().example_input
    return model.eval().requires_grad_(False)


def test_a_painter_sees_the_image_in_its_inputs() -> None:
    model, words, start = drawing(), *denoiser.drawn(5, 4)
    (x, image), *more = denoiser.drafts(5, 4, 4, model)
    assert not more and torch.equal(x, denoiser.joined(start, torch.full((4,), denoiser.MOST), words))
    noise = means(blank()(x))
    angle = torch.tensor(denoiser.MOST * torch.pi / 2)
    torch.testing.assert_close(angle.cos() * image + angle.sin() * noise, start, rtol=1e-3, atol=1e-3)


def test_bits_are_bought_by_structure_and_by_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    source, lines = ModuleSource("test_denoiser:drawing", drawing()), []
    pairs = [[torch.cat(part) for part in zip(*denoiser.drafts(seed, 16, 8, source.module), strict=True)] for seed in (1, 2)]
    parts = [Samples(x, y, 1, len(x), "") for x, y in (pairs[0], pairs[1], pairs[1])]
    split = Split(*parts, {"kind": "pairs"}, "kl")
    recipe = load_recipe("mixdq-mixed")
    found = compress(source, split, budget=["bits=4.6"], recipe=recipe, out=tmp_path / "out", log=lines.append)
    assert found["reload"]["difference"] <= 1e-4 and found["bytes"] <= 4.6 * source.parameters / 8
    # cross-attention and feed-forward of three blocks, six matrices each
    assert any("18 matrices are content, 19 quality" in line for line in lines)
    assert {form.inner.grid.bits for form in forms_of(artifact.load(tmp_path / "out"))} <= {2, 4, 8}


def test_bits_by_structure_are_refused_before_work_where_there_are_no_images(small: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_model(small[0])
    split = open_data(str(small[1]), source, seed=0, length=24, limits=(8, 2, 4))
    with pytest.raises(UserError, match="structural similarity is of square images, not of answers"):
        compress(source, split, budget=["bits=16"], recipe=load_recipe("mixdq-mixed"), out=tmp_path / "out", log=lambda _: None)
    assert not (tmp_path / "out").exists()


def forms_of(model: torch.nn.Module) -> list[Ranged]:
    return [layer.weight for layer in model.modules() if hasattr(layer, "weight") and isinstance(layer.weight, Ranged)]
