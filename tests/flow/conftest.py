"""What several flows start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A tied Llama of 3 layers with nano's tokenizer, and text for it."""
    from laconic.zoo import corpus, nano

    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((nano.path() / name).read_bytes())
    blocks = "\n\n".join(text for _, text in corpus.named("search")).split("\n\n")
    (folder / "text.txt").write_text("\n\n".join(blocks[:200]), encoding="utf-8")
    return folder / "model", folder / "text.txt"
