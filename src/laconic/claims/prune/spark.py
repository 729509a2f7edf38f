"""Claims of Spark Transformer: byte models with few neurons a token against dense ones of equal parameters, and what the few save."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, judged, spread, turns
from laconic.claims.nest.matformer import BATCH, LAYERS, LENGTH, WIDTH, lesson, said, text
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.kernels.native import native
from laconic.methods.prune.activation.spark import Sparks, exact_top, statistical_top
from laconic.tuning import tune

# neurons of the gated layer, and of one of two matrices with as many parameters
GATED = 192
PLAIN = GATED * 3 // 2
KEEP = 0.08
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# how much higher the loss may be, and how far the count from k
NEAR, COUNT = 1.02, 0.05
# a token through a wide layer
FASTER = 1.4
# a feed-forward layer of a model of 1.1 billion weights
WIDE = (5632, 2048)


class Shuffled(nn.Module):
    """The stand-in's act: what the predictor said of one neuron goes to another, each time to a different one."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.draw = act, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(x)[..., torch.randperm(x.shape[-1], generator=self.draw)]
        return found


class Blind(Sparks):
    """The stand-in: neurons run that the predictor did not mean."""

    def around(self, path: str, model: nn.Module) -> None:
        super().around(path, model)
        self._act = (Shuffled(self._act[0]),)


class TopFeed(nn.Module):
    """The baseline: down(act(the k greatest of up(x))), the others 0, with no gate."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep, self.act_fn = keep, nn.GELU(approximate="tanh")
        self.up_proj, self.down_proj = nn.Linear(WIDTH, PLAIN, bias=False), nn.Linear(PLAIN, WIDTH, bias=False)
        for one in (self.up_proj, self.down_proj):
            nn.init.normal_(one.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.up_proj(x)
        top = scores.topk(round(self.keep * PLAIN), -1)
        found: Tensor = self.down_proj(self.act_fn(torch.zeros_like(scores).scatter(-1, top.indices, top.values)))
        return found


def network(kind: str, seed: int) -> nn.Module:
    """A Llama for bytes at random: `dense` layers, `spark` ones (or `blind`), or the `top` of plain ones, in as many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: Any = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128}
    sizes |= {"max_position_embeddings": LENGTH, "tie_word_embeddings": False, "hidden_act": "gelu_pytorch_tanh"}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=GATED if kind == "dense" else PLAIN)).eval()
    for i, layer in enumerate(model.model.layers):
        if kind in ("spark", "blind"):
            part = (Sparks if kind == "spark" else Blind)(KEEP, 0.5, 0.0, NAMES)
            part.around(f"model.layers.{i}.mlp", model)
            part.run = "masked"
            layer.mlp = part
        elif kind == "top":
            layer.mlp = TopFeed(KEEP)
    return model  # type: ignore[no-any-return]


@lru_cache(maxsize=32)
def trained(kind: str, seed: int, steps: int) -> nn.Module:
    """From its start of that seed, each batch drawn once, all with one rate."""
    model = network(kind, seed)
    order = torch.randperm(len(text().learn), generator=torch.Generator().manual_seed(seed))
    batches = text().learn[order[: steps * BATCH]].split(BATCH)
    targets: Any = [rows[:, 1:] for rows in batches]

    def run(i: int, weights: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(input_ids=batches[i][:, :-1], use_cache=False).logits
        return logits

    tune(run, targets, {"": model}, lesson(steps), generator=torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


@lru_cache(maxsize=32)
def loss(kind: str, seed: int, steps: int) -> float:
    """Nats a byte on the held-out rows."""
    return said(trained(kind, seed, steps)).loss


def _steps(lab: Lab) -> int:
    return 100 if lab.quick else 600


def _learns(lab: Lab, ours: str, seeds: Sequence[int]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    found = {kind: [loss(kind, seed, _steps(lab)) for seed in lab.draws(seeds)] for kind in (ours, "dense", "top")}
    names = {ours: "8 % of the neurons", "dense": "dense and gated", "top": "exact top-k, no gate"}
    for kind, values in found.items():
        numbers[f"loss, {names[kind]}"] = spread(values, "nats/byte")
    for kind in ("dense", "top"):
        ratios = [a / b for a, b in zip(found[ours], found[kind], strict=True)]
        numbers[f"loss over that of {names[kind]}"] = spread(ratios, "")
    wrong = []
    if any(a > NEAR * b for a, b in zip(found[ours], found["dense"], strict=True)):
        wrong.append("the loss is more than 2 % above that of dense layers")
    if any(a >= b for a, b in zip(found[ours], found["top"], strict=True)):
        wrong.append("the loss is not below that of an exact top-k without a gate")
    return judged(wrong, numbers)


def uncentred(scores: Tensor, keep: float) -> Tensor:
    """A stand-in: scores are taken to have no mean."""
    return F.relu(scores - scores.std(-1, keepdim=True) * NormalDist().inv_cdf(1 - keep))


def _scores(model: Any) -> list[Tensor]:
    """Of each layer what the predictor says of the held-out rows, (t, n)."""
    found: list[Tensor] = []

    def hear(module: Any, args: tuple[Tensor, ...]) -> None:
        found.append(F.linear(args[0].flatten(0, 1)[:, : WIDTH // 2], module.gate_proj.weight[:, : WIDTH // 2]))

    hooks = [layer.mlp.register_forward_pre_hook(hear) for layer in model.model.layers]
    with torch.inference_mode():
        model(input_ids=text().held[:64, :-1], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _counted(scores: Tensor, top: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Neurons that run, over k, for each row."""
    return (top(scores, KEEP) > 0).float().mean(-1) / KEEP


def _drawn(lab: Lab, top: Callable[[Tensor, float], Tensor]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong = []
    for n in (1024, 8192, 65536):
        scores = 3 * torch.randn(1 << 21, generator=torch.Generator().manual_seed(n)).reshape(-1, n) + 2
        found = _counted(scores, top)
        numbers[f"{n} neurons: neurons over k"] = spread(found.tolist(), "")
        if abs(float(found.mean()) - 1) > COUNT:
            wrong.append(f"the count of {n} neurons is more than {COUNT:.0%} from k")
    return judged(wrong, numbers)


def _counts(lab: Lab, top: Callable[[Tensor, float], Tensor], seeds: Sequence[int]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    shares: dict[int, list[float]] = {}
    for seed in lab.draws(seeds):
        for layer, scores in enumerate(_scores(trained("spark", seed, _steps(lab)))):
            shares.setdefault(layer, []).append(float(_counted(scores, top).mean()))
    for layer, values in shares.items():
        numbers[f"layer {layer}: neurons over k"] = spread(values, "")
    off = max(abs(value - 1) for values in shares.values() for value in values)
    return judged([f"a layer's count is {off:.0%} from k, more than {COUNT:.0%}"] if off > COUNT else [], numbers)


def _sorts(scores: Tensor, keep: float) -> Tensor:
    """A stand-in."""
    k = round(keep * scores.shape[-1])
    return F.relu(scores - scores.sort(-1, descending=True).values[..., k : k + 1])


def _selects(lab: Lab, top: Callable[[Tensor, float], Tensor]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong = []
    for n in (4096, 16384) if lab.quick else (4096, 16384, 65536):
        scores = torch.randn(1 << 21, generator=torch.Generator().manual_seed(n)).reshape(-1, n)
        theirs, ours = turns([partial(exact_top, scores, KEEP), partial(top, scores, KEEP)], 9)
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        numbers[f"{n} neurons: times as fast as torch.topk"] = spread(ratios, "")
        if statistics.median(ratios) <= 1:
            wrong.append(f"over {n} neurons it is no faster than torch.topk")
    return judged(wrong, numbers)


def _layer(width: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(seed)
    layer = LlamaMLP(LlamaConfig(hidden_size=WIDE[1], intermediate_size=width, hidden_act="gelu_pytorch_tanh"))
    return layer.to(torch.bfloat16).requires_grad_(False).eval()  # type: ignore[no-any-return]


def _through(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _decodes(lab: Lab, keep: float) -> Verdict:
    """One token through layers that no cache holds, in bf16: dense and gated, and Spark's of as many parameters in use."""
    if native() is None:
        return Verdict("cannot be checked here", {}, "the native kernels were not built here")
    dense, few = [_layer(WIDE[0], seed) for seed in range(4)], []
    for seed in range(4):
        around = nn.ModuleDict({"mlp": _layer(WIDE[0] * 3 // 2, seed)})
        few.append(Sparks(keep, 0.5, 0.0, NAMES))
        few[-1].around("mlp", around)
    x = torch.randn(1, 1, WIDE[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, some = turns([partial(_through, layers, x) for layers in (dense, few)], 7 if lab.quick else 21)
    ratios = [a / b for a, b in zip(whole, some, strict=True)]
    share = statistics.fmean(part.load.expected / part.load.worst for part in few)
    numbers = {
        "times as fast as dense and gated layers": spread(ratios, ""),
        "multiplications, as a share of those of all its neurons": Measurement(share, "", len(few)),
    }
    return judged([] if statistics.median(ratios) > FASTER else [f"a token is not {FASTER:g} times as fast"], numbers)


PAPER = Paper("You et al.", 2025, "arXiv:2506.06644")
SCALE = (
    f"Llamas of {LAYERS} layers and width {WIDTH} on bytes of Python source, {GATED} gated neurons or {PLAIN} of two matrices, "
    f"100 steps of {BATCH} x {LENGTH} bytes (full: 600), {len(SEEDS)} seeds"
)
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Learned from scratch with 8 % of the neurons running, the loss is within 2 % of that of dense gated layers of as many "
        "parameters, and below that of an exact top-k without a gate.",
        where=PAPER,
        scale=f"{SCALE}; the stand-in runs neurons that the predictor did not mean",
        check=partial(_learns, ours="spark", seeds=SEEDS),
        broken=partial(_learns, ours="blind", seeds=ONE),
    ),
    Claim(
        says="Of scores that are normal numbers of any mean and spread statistical top-k keeps within 5 % of k on average.",
        where=PAPER,
        scale="two million scores in rows of 1,024, 8,192 and 65,536, k of 8 %; the stand-in takes scores to have no mean",
        check=partial(_drawn, top=statistical_top),
        broken=partial(_drawn, top=uncentred),
    ),
    Claim(
        says="In models that learned with it statistical top-k keeps within 5 % of k neurons, in every layer.",
        where=PAPER,
        scale=f"{SCALE}; the stand-in takes scores to have no mean",
        check=partial(_counts, top=statistical_top, seeds=SEEDS),
        broken=partial(_counts, top=uncentred, seeds=ONE),
    ),
    Claim(
        says="Statistical top-k takes less time than torch.topk over wide rows.",
        where=PAPER,
        scale="two million scores in rows of 4,096 and 16,384 (in full 65,536), 8 % kept, in turns; the stand-in sorts",
        check=partial(_selects, top=statistical_top),
        broken=partial(_selects, top=_sorts),
        timed=True,
    ),
    Claim(
        says="A token passes a wide layer at least 1.4 times as fast as a dense gated one of as many parameters.",
        where=PAPER,
        scale=f"{WIDE[0]} gated neurons and {WIDE[0] * 3 // 2} over {WIDE[1]} inputs in bf16, random weights, in turns; the stand-in runs "
        "all neurons",
        check=partial(_decodes, keep=KEEP),
        broken=partial(_decodes, keep=1.0),
        timed=True,
    ),
)
