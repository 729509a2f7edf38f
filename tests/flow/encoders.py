"""Tiny random encoders of transformers' own classes as modules of one input, and inputs for them, as a user's own file would hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COMMON: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.copy_(0.6 + torch.rand(parameter.shape))
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**COMMON, vocab_size=64, max_position_embeddings=32, num_labels=5, attn_implementation="eager")
    model = _random(lambda: BertForSequenceClassification(config))
    model.example_input = tokens()[:1]  # type: ignore[assignment]
    return model


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**COMMON, image_size=16, patch_size=4, num_labels=5, attn_implementation="eager")
    model = _random(lambda: ViTForImageClassification(config))
    model.example_input = pictures()[:1]  # type: ignore[assignment]
    return model


class ZeroShot(nn.Module):
    """CLIP as a classifier: images against a fixed set of texts -> logits (b, texts)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        text = {**COMMON, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
        vision = {**COMMON, "image_size": 16, "patch_size": 4}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, attn_implementation="eager")
        self.clip = CLIPModel(config)
        self.register_buffer("texts", self.prompts(), persistent=False)

    @staticmethod
    def prompts() -> Tensor:
        texts = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(3))
        texts[:, -1] = 2
        return texts

    def forward(self, pictures: Tensor) -> Tensor:
        return self.clip(input_ids=self.texts, pixel_values=pictures).logits_per_image  # type: ignore[no-any-return]


def clip() -> nn.Module:
    model = _random(ZeroShot)
    model.example_input = pictures()[:1]  # type: ignore[assignment]
    return model


class Transcribes(nn.Module):
    """Whisper from features and a fixed prompt -> logits of the next token (b, v)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        config = WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, attn_implementation="eager",
        )  # fmt: skip
        self.whisper = WhisperForConditionalGeneration(config)
        self.register_buffer("prompt", torch.tensor([[1, 5, 9, 11]]), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.whisper(input_features=features, decoder_input_ids=self.prompt.expand(len(features), -1)).logits[:, -1]  # type: ignore[no-any-return]


def whisper() -> nn.Module:
    model = _random(Transcribes)
    model.example_input = speech()[:1]  # type: ignore[assignment]
    return model


class Translates(nn.Module):
    """T5 from tokens, which its decoder is shown too -> logits of the last token (b, v)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True,
        )  # fmt: skip
        self.t5 = T5ForConditionalGeneration(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.t5(input_ids=ids, decoder_input_ids=ids.roll(1, 1)).logits[:, -1]  # type: ignore[no-any-return]


def t5() -> nn.Module:
    model = _random(Translates)
    model.example_input = tokens()[:1]  # type: ignore[assignment]
    return model


class Separable(nn.Module):
    """Depthwise, pointwise and grouped convolutions, and 1-D ones after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 16, 1)
        self.groups = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.wide = nn.Conv1d(24, 24, 5, padding=2, groups=3)
        self.head = nn.Linear(24, 5)

    def forward(self, pictures: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.depth(torch.relu(self.stem(pictures)))))
        x = torch.relu(self.groups(torch.relu(self.point(x)))).flatten(2)
        return self.head(torch.relu(self.wide(x)).mean(2))  # type: ignore[no-any-return]


def separable() -> nn.Module:
    model = _random(Separable)
    model.example_input = pictures()[:1]  # type: ignore[assignment]
    return model


def tokens(count: int = 40) -> Tensor:
    return torch.randint(3, 64, (count, 10), generator=torch.Generator().manual_seed(1))


def pictures(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def speech(count: int = 40) -> Tensor:
    return torch.randn(count, 8, 40, generator=torch.Generator().manual_seed(1))


def clip_given() -> tuple[Tensor, Tensor]:
    """For CLIP's own class: images, and the texts as a further input."""
    return _with_classes(pictures())


clip_given.given = {"input_ids": ZeroShot.prompts()}  # type: ignore[attr-defined]


def masked() -> nn.Module:
    """BERT that answers at every token, its head tied to its table."""
    from transformers import BertConfig, BertForMaskedLM

    return _random(lambda: BertForMaskedLM(BertConfig(**COMMON, vocab_size=64, max_position_embeddings=32)))


def masked_data() -> tuple[Tensor, Tensor]:
    rows = tokens()
    rows[::2, :3] = 0
    return rows, rows


masked_data.metric = "kl"  # type: ignore[attr-defined]


INPUTS = {"bert": tokens, "vit": pictures, "clip": pictures, "whisper": speech, "t5": tokens}


def _with_classes(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, torch.arange(len(inputs)) % 5


def bert_data() -> tuple[Tensor, Tensor]:
    return _with_classes(tokens())


def vit_data() -> tuple[Tensor, Tensor]:
    return _with_classes(pictures())


def separable_data() -> tuple[Tensor, Tensor]:
    return _with_classes(pictures())


def clip_data() -> tuple[Tensor, Tensor]:
    return _with_classes(pictures())


def whisper_data() -> tuple[Tensor, Tensor]:
    return _with_classes(speech())


def t5_data() -> tuple[Tensor, Tensor]:
    return _with_classes(tokens())
