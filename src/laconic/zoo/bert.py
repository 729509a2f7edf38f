"""Train `bert`, a small encoder: `python -m laconic.zoo.bert [--minutes M] [--tokens N] [--out FOLDER]`.

BERT as transformers builds it, 1.4 M parameters in 2.7 MB, byte-level BPE of 1,024, trained on the standard library's sources to tell
tokens that are hidden from it (Devlin et al. 2019, arXiv:1810.04805, section 3.1), by the steps of `laconic.zoo.nano`: Muon for the
matrices of the layers, AdamW for the rest. Half an hour of two cores.

`--data laconic.zoo.bert:calibrate --data-certify laconic.zoo.bert:certify` gives it held-out text with tokens hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.zoo import corpus, small
from laconic.zoo.nano import BOS, Recipe

if TYPE_CHECKING:
    import torch

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, CONTEXT = 1024, 128, 512, 6, 4, 128
MASK, PAD = 1, 2
# of the tokens, how many are asked for; of these how many are hidden, and how many are replaced by any other
ASKED, HIDDEN_SHARE, OTHER_SHARE = 0.15, 0.8, 0.1
# rows of text that each list of held-out modules gives
ROWS = 512


def path() -> Path:
    """Return the folder of the shipped model, an ordinary Hugging Face folder."""
    return small.path("bert")


def new_model(seed: int = 0) -> Any:
    """Return a fresh fp32 BertForMaskedLM whose residual outputs start small."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=PAD,
    )
    # transformers draws from the global generator: seeded here, given back as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config)


def masked(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (b, t) -> what the model is shown, and where it is asked (bool): 15 % of the tokens, of which 80 % are hidden, 10 % are other
    tokens and 10 % stay. The draw follows from the tokens, so that the same rows are always asked the same."""
    import torch

    draw = torch.Generator().manual_seed(int(ids.sum()))
    asked = (torch.rand(ids.shape, generator=draw) < ASKED) & (ids > PAD)
    what = torch.rand(ids.shape, generator=draw)
    other = torch.randint(PAD + 1, VOCABULARY, ids.shape, generator=draw)
    shown = torch.where(asked & (what < HIDDEN_SHARE), MASK, ids)
    replaced = asked & (what >= HIDDEN_SHARE) & (what < HIDDEN_SHARE + OTHER_SHARE)
    return torch.where(replaced, other, shown), asked


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of the tokens asked for, of ids (b, t + 1) without the last."""
    import torch.nn.functional as F

    ids = ids[:, :-1]
    shown, asked = masked(ids)
    logits = model.cls(model.bert(shown).last_hidden_state[asked])
    return F.cross_entropy(logits.float(), ids[asked])


def _rows(name: str) -> Any:
    """(inputs, target) of a list of held-out modules: rows (128,) with tokens hidden, and what stood there."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path() / "tokenizer.json"))
    flat = torch.tensor([t for _, text in corpus.named(name) for t in (0, *tokenizer.encode(text).ids)])
    count = min(ROWS, len(flat) // CONTEXT)
    # evenly spaced, so that every module is there
    for start in ((len(flat) - CONTEXT) * i // max(1, count - 1) for i in range(count)):
        ids = flat[start : start + CONTEXT]
        yield masked(ids[None])[0][0], ids


def calibrate() -> Any:
    """Rows of the calibration list, to search and calibrate on."""
    return _rows("calibrate")


def certify() -> Any:
    """Rows of the test list."""
    return _rows("certify")


SUBJECT = small.Subject(
    name="bert",
    title="A small encoder of Python source code: a subject for methods that act on BERT.",
    architecture=f"""BERT (`BertForMaskedLM`): {LAYERS} layers, hidden {HIDDEN}, intermediate {INNER}, {HEADS} heads, context \
{CONTEXT}, the head tied to the
embedding, {{parameters:,}} parameters stored in bf16. Byte-level BPE of {VOCABULARY:,} with three special tokens: `{BOS}`
(id 0), which opens every document, one that hides a token (id {MASK}) and one that fills rows up (id {PAD}).""",
    task="fill-mask",
    learned=" 15 % of the tokens are asked for, of which 80 % are hidden and 10 % replaced.",
    vocabulary=VOCABULARY,
    marks={"mask_token": "<|mask|>", "pad_token": "<|pad|>"},
    auto="MaskedLM",
    new_model=new_model,
    loss=loss_of,
    projections=r".*encoder\.layer\..*",
    recipe=Recipe(tokens=100_000_000, batch=4096, short=CONTEXT, micro=2048, muon=0.01, adamw=0.004, warmup=40),
    context=CONTEXT,
    # a pass of other masks each time
    epochs=3,
)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    SUBJECT.main(__doc__, arguments)


if __name__ == "__main__":
    main()
