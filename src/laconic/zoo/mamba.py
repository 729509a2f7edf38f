"""Train `mamba`, a small state-space language model: `python -m laconic.zoo.mamba [--minutes M] [--tokens N] [--out FOLDER]`.

Mamba as transformers builds it, 1.4 M parameters in 2.7 MB, byte-level BPE of 1,024, an embedding and a head of its own, trained on the
standard library's sources as `laconic.zoo.nano` is, by the same steps: Muon for the projections, AdamW for the rest. The scan runs as
`laconic.kernels.scan`, which is some times faster in training than transformers' own without a graphics card. Half an hour of two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laconic.zoo import small
from laconic.zoo.nano import BOS, Recipe, loss_of

VOCABULARY, HIDDEN, LAYERS, STATES, RANK = 1024, 192, 4, 8, 12
# of the layers, what Muon moves
PROJECTIONS = r".*\.(in_proj|x_proj|out_proj)\.weight"


def path() -> Path:
    """Return the folder of the shipped model, an ordinary Hugging Face folder."""
    return small.path("mamba")


def new_model(seed: int = 0) -> Any:
    """Return a fresh fp32 MambaForCausalLM whose residual outputs start small."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=STATES,
        time_step_rank=RANK,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    # transformers draws from the global generator: seeded here, given back as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(config)


def opened(model: Any) -> Any:
    """Put the mixer whose scan has a fast gradient in each layer of a model; its parameters stay where they are, under their names."""
    from laconic.methods.quantize.rotate.mixer import Mixer

    for layer in model.base_model.layers:
        mixer = Mixer()
        mixer.over(layer.mixer)
        layer.mixer = mixer
    return model


def plain(model: Any) -> Any:
    """Return transformers' own model with the weights of an opened one."""
    new: Any = new_model()
    new.load_state_dict(model.state_dict())
    return new


SUBJECT = small.Subject(
    name="mamba",
    title="A small state-space language model of Python source code: a subject for methods that act on Mamba.",
    architecture=f"""Mamba (`MambaForCausalLM`): {LAYERS} layers, hidden {HIDDEN}, {2 * HIDDEN} channels of {STATES} states, steps of rank \
{RANK}, an embedding
and a head of its own, {{parameters:,}} parameters stored in bf16. Byte-level BPE of {VOCABULARY:,} with one special token, `{BOS}`
(id 0), which opens every document.""",
    task="text-generation",
    learned="",
    vocabulary=VOCABULARY,
    marks={},
    auto="CausalLM",
    new_model=new_model,
    loss=loss_of,
    projections=PROJECTIONS,
    recipe=Recipe(tokens=small.FULL, batch=4096, short=256, micro=1024, muon=0.01, adamw=0.004, warmup=40),
    context=512,
    opened=opened,
    plain=plain,
)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    SUBJECT.main(__doc__, arguments)


if __name__ == "__main__":
    main()
