"""The CIFAR ResNet-20 of He et al. 2016, section 4.2, option A shortcuts, with the shared weights and images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(os.environ.get("LACONIC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.stride, self.pad = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        inner = 16
        for stage, outer in enumerate((16, 32, 64), 1):
            made = []
            for k in range(blocks):
                made.append(Block(inner, outer, 2 if k == 0 and stage > 1 else 1))
                inner = outer
            setattr(self, f"layer{stage}", nn.Sequential(*made))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20() -> nn.Module:
    model = ResNet(3)
    model.load_state_dict(load_file(DATA / "resnet_cifar10" / "resnet20.safetensors"), strict=False)
    return model.eval()


def _images(part: str, count: int) -> tuple[Tensor, Tensor]:
    stored = np.load(DATA / "cifar10" / "cifar10_10k_1k.npz")
    x = torch.from_numpy(stored[f"{part}_x"][:count]).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN) / STD, torch.from_numpy(stored[f"{part}_y"][:count]).long()


def train() -> tuple[Tensor, Tensor]:
    return _images("train", 4000)


def test() -> tuple[Tensor, Tensor]:
    return _images("test", 1000)
