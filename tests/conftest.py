"""What several test files share."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# `bench` is no part of the installed package
sys.path.insert(0, str(ROOT))


def _interpreted() -> None:
    """Without a GPU, Triton's kernels run in its interpreter, which has to be asked for before anything imports triton."""
    import torch

    if find_spec("triton") is not None and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


_interpreted()
# what a user's machine was measured to do is nothing to the tests
os.environ["LACONIC_PICKS"] = "shipped"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; tests that need it are skipped where it is not there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this clone")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a random tied Llama with nano's tokenizer, and a text of so many blocks for it; further arguments go to its config."""

    def make(layers: int, blocks: int, **more: Any) -> tuple[Path, Path]:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from laconic.zoo import corpus, nano

        folder = tmp_path_factory.mktemp("tiny")
        sizes = {"hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        sizes |= {"vocab_size": 4096, "max_position_embeddings": 128, "num_hidden_layers": layers, "bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **{**sizes, **more})).to(torch.bfloat16).save_pretrained(folder / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "model" / name).write_bytes((nano.path() / name).read_bytes())
        texts = "\n\n".join(text for _, text in corpus.named("search")).split("\n\n")
        (folder / "text.txt").write_text("\n\n".join(texts[:blocks]), encoding="utf-8")
        return folder / "model", folder / "text.txt"

    return make


@pytest.fixture(scope="session")
def small(tiny: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    """The folder of a Llama of 3 layers, and text for it."""
    return tiny(layers=3, blocks=200)


@pytest.fixture
def flat_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[str, str]]:
    """Makes a module with a network that has no stack of layers, and so many batches of 16 for it; -> names of its factory and data."""

    def make(batches: int) -> tuple[str, str]:
        name = f"flat_net_{batches}"
        (tmp_path / f"{name}.py").write_text(
            textwrap.dedent(f"""
            import torch
            from torch import nn

            def make():
                torch.manual_seed(1)
                return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)).eval()

            def data():
                g = torch.Generator().manual_seed(0)
                for _ in range({batches}):
                    x = torch.randn(16, 3, 4, 4, generator=g)
                    yield x, torch.randint(0, 5, (16,), generator=g)

            data.metric = "accuracy"
            """)
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"{name}:make", f"{name}:data"

    return make
