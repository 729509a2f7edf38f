"""The walk gives what the whole model gives: logits, inputs of every layer, gradients; shortcuts change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from laconic import calibration
from laconic.calibration import PRICING, Shelf, Walk, release, rows_of
from laconic.core.site import Conv, Site, Stage, TensorId
from laconic.core.statistic import Fisher, Gram, LookupFisher, Lookups, Seen
from laconic.models import open_model
from laconic.pipeline import finished_logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, max_position_embeddings=64, tie_word_embeddings=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return open_model(folder)


TOKENS = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))


def test_logits_of_a_walk_are_the_models(source):
    whole = source.load(torch.float32)(TOKENS).logits
    walked = torch.cat(list(finished_logits(source, TOKENS, 2)))
    torch.testing.assert_close(walked, whole, rtol=1e-5, atol=1e-5)


def test_a_half_used_generator_leaves_gradients_on(source):
    found = finished_logits(source, TOKENS, 2)
    next(found)
    assert torch.is_grad_enabled()


def _direct(source) -> dict[str, dict[str, torch.Tensor]]:
    """Gram and Fisher by plain autograd over the whole model, labels drawn in the walk's order."""
    model = source.load(torch.float32)
    seen: dict[str, list] = {}
    names = {site.name for site in source.anatomy.sites()} | {"lm_head"}
    for name, module in model.named_modules():
        if name in names and isinstance(module, nn.Linear):

            def hook(module, args, output, name=name):
                entry = [args[0].detach().reshape(-1, args[0].shape[-1]), None]
                seen.setdefault(name, []).append(entry)
                output.register_hook(lambda g: entry.__setitem__(1, g.reshape(-1, g.shape[-1])))

            module.register_forward_hook(hook)
    generator = torch.Generator().manual_seed(3)
    for row in TOKENS:
        embedded = model.model.embed_tokens(row[None]).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
    found = {}
    for name, entries in seen.items():
        x, g = torch.cat([e[0] for e in entries]), torch.cat([e[1] for e in entries])
        found[name] = {"gram": x.T @ x / x.shape[0], "fisher": g.square().mean(0)}
    return found


@pytest.mark.parametrize("wide", [False, True], ids=["plain head", "head by rows"])
def test_backward_walk_is_autograd_over_the_whole_model(source, tmp_path, monkeypatch, wide):
    if wide:
        monkeypatch.setattr(calibration, "WIDE", 100)
    direct = _direct(source)
    walk = Walk(source, TOKENS, batch=2, shelf=tmp_path)
    walk.begin()
    checked = 0
    for segment, _, stats in walk.backward(PRICING, torch.Generator().manual_seed(3), lambda done, total: None):
        for site in segment.sites:
            name = site.roles.get("tied", site.name)
            if name in direct:
                torch.testing.assert_close(stats[site.name][Gram()], direct[name]["gram"], rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(stats[site.name][Fisher()], direct[name]["fisher"], rtol=1e-3, atol=1e-5)
                checked += 1
            if "embed" in site.name:
                counts = torch.bincount(TOKENS.reshape(-1), minlength=64) / TOKENS.numel()
                torch.testing.assert_close(stats[site.name][Lookups()], counts)
                assert (stats[site.name][LookupFisher()] > 0).all()
    assert checked == 15


def test_kept_inputs_change_no_bit(source, monkeypatch):
    def run(kept: int) -> list[torch.Tensor]:
        monkeypatch.setattr(calibration, "KEPT", kept)
        walk = Walk(source, TOKENS, batch=2)
        walk.begin()
        found = []
        for segment in walk.layers:
            module = walk.take(segment)
            for stage in segment.stages:
                stats = walk.observe(module, segment, stage.sites, (Gram(),))
                for site in stage.sites:
                    found.append(stats[site.name][Gram()])
                    walk.site_module(module, segment, site).weight.data.mul_(1.1)
            walk.advance(module, segment)
            assert all("forward" not in vars(m) for m in module.modules())
            release(module)
        return [*found, *walk.hidden]

    plain, kept = run(0), run(1 << 30)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_shelf_files_what_exceeds_its_limit(tmp_path: Path):
    shelf = Shelf(tmp_path / "shelf", limit=100)
    for i in range(4):
        shelf.put(str(i), torch.full((10,), float(i)))
    assert len(shelf.held) == 2
    assert [float(shelf.get(str(i))[0]) for i in range(4)] == [0.0, 1.0, 2.0, 3.0]
    shelf.clear()
    assert not list((tmp_path / "shelf").iterdir())


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_rows_of_a_convolution_times_its_matrix_are_its_outputs(padding):
    conv = nn.Conv2d(3, 5, 3, padding=padding, bias=False)
    site = Site("c", Conv(), {"weight": TensorId("c.weight")}, tuple(conv.weight.shape))
    x = torch.randn(2, 3, 8, 9)
    rows = rows_of(site, x, conv)
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 5)
    torch.testing.assert_close(rows @ conv.weight.reshape(5, -1).T, expected, rtol=1e-4, atol=1e-5)


def test_stages_share_what_depends_on_the_input_alone(source):
    walk = Walk(source, TOKENS, batch=5)
    walk.begin()
    segment = walk.layers[0]
    module = walk.take(segment)
    stage = segment.stages[0]
    together = walk.observe(module, segment, stage.sites, (Gram(),))
    alone = walk.observe(module, segment, Stage(stage.sites[1:2]).sites, (Gram(),))
    assert torch.equal(together[stage.sites[1].name][Gram()], alone[stage.sites[1].name][Gram()])


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_of_a_convolution_have_their_own_gram_and_rounding(groups):
    """A grouped convolution is so many small ones side by side: the same Gram, codes and damage as each alone."""
    from laconic.kernels.grids import Grid
    from laconic.kernels.obs import output_error
    from laconic.methods.prune.score.wanda import wanda
    from laconic.methods.quantize.round.gptq import GPTQ

    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(3, 8, 5, 5) * torch.linspace(0.2, 3, 8)[:, None, None]

    def site_of(conv):
        context = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        return Site("conv", Conv(), {"weight": TensorId("conv.weight")}, tuple(conv.weight.shape), {}, context)

    def seen_by(conv, x):
        site, gram = site_of(conv), Gram()
        # in two passes, to be merged
        halves = [gram.update(gram.init(site), Seen(x=rows_of(site, part, conv))) for part in (x[:1], x[1:])]
        return site, gram.finish(gram.merge(*halves))

    site, gram = seen_by(conv, x)
    assert gram.shape == (groups, site.matrix[1], site.matrix[1])
    weight = conv.weight.detach()
    (change,) = GPTQ(clip=True).several(site, {"weight": weight}, {Gram(): gram}, [Grid(3, None)])
    rounded = change.hold[site.tensors["weight"]].dense()
    n, m = 16 // groups, 8 // groups
    error = output_error((rounded - weight).reshape(16, -1), gram)
    for i in range(groups):
        alone = nn.Conv2d(m, n, 3, padding=1, bias=False)
        alone.weight.data = weight[i * n : (i + 1) * n]
        one, own = seen_by(alone, x[:, i * m : (i + 1) * m])
        torch.testing.assert_close(gram[i], own, rtol=1e-4, atol=1e-5)
        (found,) = GPTQ(clip=True).several(one, {"weight": alone.weight.detach()}, {Gram(): gram[i]}, [Grid(3, None)])
        torch.testing.assert_close(rounded[i * n : (i + 1) * n], found.hold[one.tensors["weight"]].dense())
        delta = (found.hold[one.tensors["weight"]].dense() - alone.weight.detach()).reshape(n, -1)
        torch.testing.assert_close(error[i * n : (i + 1) * n], output_error(delta, gram[i]))
        score = wanda(weight.reshape(16, -1), gram)[i * n : (i + 1) * n]
        torch.testing.assert_close(score, wanda(alone.weight.detach().reshape(n, -1), gram[i]))
