"""Truncated SVD and FlashSVD on cases small enough to work out by hand; expected numbers are literal."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from laconic.artifact import put, stand
from laconic.core.packed import Held
from laconic.core.site import Linear, Site, TensorId
from laconic.kernels.lowrank import Factors, Heads, streamed_attention, streamed_feed
from laconic.methods.factorize.lowrank.svd import SVD, Kept, product
from laconic.methods.factorize.stream.flashsvd import FlashSVD, StreamedAttention, StreamedFeed
from laconic.stepping import steps_of


def site(n: int, m: int) -> Site:
    return Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (n, m))


def test_truncated_by_hand():
    # singular values 4 and 1 along (1, 0) and (0, 1): rank 1 keeps the 4, each factor its root
    (held,) = SVD()(site(2, 2), {"weight": torch.tensor([[4.0, 0.0], [0.0, 1.0]])}, {}, Kept(1.0)).hold.values()
    assert held.left.value.abs().tolist() == [[2.0, 0.0]] and held.right.value.abs().tolist() == [[2.0, 0.0]]
    assert held.dense().tolist() == [[4.0, 0.0], [0.0, 0.0]]
    assert held.nbytes == SVD().stored(site(2, 2), Kept(1.0)) == 8
    # 0.5 of 6 x 12 numbers are 36: two of 18 fit; a share that no rank fits keeps one
    assert Kept(0.5).rank(6, 12) == 2 and Kept(0.01).rank(6, 12) == 1
    with pytest.raises(ValueError, match="share=0"):
        Kept(0.0)


def test_a_feed_forward_layer_by_hand():
    # p = x1 + x2; neurons relu(1 p, -1 p, 2 p); out = (their sum) (1, 10), plus 0.5
    up = Factors(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
    down = Factors(torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([0.5, 0.5]))
    x = torch.tensor([[1.0, 2.0], [-1.0, -1.0], [0.0, 0.0]])
    for tokens in (1, 2, 5):
        for neurons in (1, 2, 3, 9):
            for stages in (1, 2):
                out = streamed_feed(x, [up], down, torch.relu, tokens=tokens, neurons=neurons, stages=stages)
                assert out.tolist() == [[9.5, 90.5], [2.5, 20.5], [0.5, 0.5]]
    # gated: relu(gate) * up, both the same, so squares
    out = streamed_feed(x, [up, up], down, torch.relu, tokens=2, neurons=2)
    assert out.tolist() == [[45.5, 450.5], [4.5, 40.5], [0.5, 0.5]]


def test_attention_by_hand():
    # one head of one channel, all scores 0: a token sees the mean of those before it
    zero, one = Factors(torch.zeros(1, 1), torch.ones(1, 1)), Factors(torch.ones(1, 1), torch.ones(1, 1))
    x = torch.tensor([[[3.0], [5.0], [1.0], [7.0]]])
    for tile in (1, 2, 3, 4, 10):
        out = streamed_attention(x, zero, zero, one, one, Heads(1, 1, 1.0), queries=tile, keys=tile)
        assert out.flatten().tolist() == [3.0, 4.0, 3.0, 4.0]
        # the first token is padding, and nobody sees it: it sees nothing itself
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        mask[:, 0] = False
        out = streamed_attention(x, zero, zero, one, one, Heads(1, 1, 1.0, None, mask[None, None]), queries=tile, keys=tile)
        torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 5.0, 3.0, 13 / 3]))
    # a score of ln 3 for the second token against 0: weights of 1/4 and 3/4; a tile whose maximum comes later fades what came before
    keys = torch.tensor([[[0.0], [math.log(3)]]])
    out = streamed_attention(keys, Factors(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)), one, one, one, Heads(1, 1, 1.0), keys=1)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.75 * math.log(3)]))
    # scores of 10,000: no overflow
    loud = torch.tensor([[[100.0], [-100.0], [100.0]]])
    out = streamed_attention(loud, one, one, one, one, Heads(1, 1, 1.0), queries=2, keys=1)
    torch.testing.assert_close(out.flatten(), torch.tensor([100.0, -100.0, 100.0]))


def llama(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 128, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval().requires_grad_(False)


def in_products(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            n, m = layer.weight.shape
            held = product(torch.randn(n, 3, generator=draw) / 2, torch.randn(3, m, generator=draw) / m**0.5)
            bias = None if layer.bias is None else torch.randn(n, generator=draw)
            put(model.model, name, Held(held, layer, bias))
    return model


def streamed(model: nn.Module, tokens: int = 7, stages: int = 1) -> nn.Module:
    for i in range(2):
        stand(model, f"model.layers.{i}.self_attn", StreamedAttention(tokens))
        stand(model, f"model.layers.{i}.mlp", StreamedFeed(tokens, 9, stages))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_model_of_products_computes_the_same_by_tiles(implementation, stages):
    naive, ours = (in_products(llama(attn_implementation=implementation)) for _ in range(2))
    streamed(ours, stages=stages)
    names = list(naive.state_dict())
    assert list(ours.state_dict()) == names
    ids, mask = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(2)), torch.ones(2, 37, dtype=torch.long)
    mask[1, :11] = 0
    for words in ({}, {"attention_mask": mask}):
        wanted, found = (model(input_ids=ids, use_cache=False, **words).logits for model in (naive, ours))
        seen = mask.bool() if words else torch.ones_like(ids).bool()
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-4, atol=1e-5)
    parts = [part for part in ours.modules() if isinstance(part, (StreamedFeed, StreamedAttention))]
    assert len(parts) == 4 and all(part.sound for part in parts)
    # where a cache holds keys and values attention runs as it is
    wanted, found = (model.generate(ids[:1], max_new_tokens=5, do_sample=False) for model in (naive, ours))
    assert wanted.tolist() == found.tolist()
    # a copy is a model of its own
    again = copy.deepcopy(ours)
    again.model.layers[0].mlp.down_proj.weight.left.value.zero_()
    assert not torch.equal(again(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert torch.equal(ours(input_ids=ids, use_cache=False).logits, found_again := ours(input_ids=ids, use_cache=False).logits)
    assert found_again.isfinite().all()
    # a tape would store what is wide
    assert steps_of(ours) == "StreamedAttention stands for attention in one of its layers"


def test_what_is_no_product_or_another_function_runs_as_it_is():
    plain, ours = llama(), streamed(llama())
    ids = torch.arange(20)[None]
    assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.act = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), nn.ReLU()

        def forward(self, x):
            return self.down(self.act(self.up(x)) * 2)

    odd = nn.Sequential(Odd())
    for name in ("up", "down"):
        layer = odd[0].get_submodule(name)
        put(odd, f"0.{name}", Held(product(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features)), layer, None))
    x = torch.arange(12.0).reshape(3, 4)
    wanted = odd(x)
    stand(odd, "0", StreamedFeed(2, 2, 1))
    with pytest.warns(UserWarning, match="Odd is not streamed"):
        assert torch.equal(odd(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(odd(x), wanted)


def test_knobs_that_make_no_sense():
    with pytest.raises(ValueError, match="stages=3"):
        FlashSVD(stages=3)
