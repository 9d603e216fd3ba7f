"""Enough of torchvision to run the lpips package where there is none.

On a CPU-only torch pip installs a torchvision that cannot be imported. lpips takes three networks from it; these have
the same layers under the same names, with a small classifier, so that one state dict of features fits both.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn


class Network(nn.Module):
    def __init__(self, *features: nn.Module, pretrained: bool | None = None) -> None:
        super().__init__()
        if pretrained is not None:  # as torchvision does
            warnings.warn("The parameter 'pretrained' is deprecated since 0.13", UserWarning, stacklevel=2)
        assert not pretrained, "pretrained weights are to be had from get_weight"
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(2, 2)


class Fire(nn.Module):
    """SqueezeNet's block."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def relu(*args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(*args, **kwargs), nn.ReLU(inplace=True)


def alexnet(pretrained: bool | None = None) -> Network:
    return Network(
        *relu(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *relu(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *relu(192, 384, 3, padding=1),
        *relu(384, 256, 3, padding=1),
        *relu(256, 256, 3, padding=1),
        nn.MaxPool2d(3, 2),
        pretrained=pretrained,
    )


def squeezenet1_1(pretrained: bool | None = None) -> Network:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    early = (pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(), Fire(128, 32, 128), Fire(256, 32, 128), pool())
    late = (Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256))
    return Network(*relu(3, 64, 3, stride=2), *early, *late, pretrained=pretrained)


def vgg16(pretrained: bool | None = None) -> Network:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += relu(channels, width, 3, padding=1)
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return Network(*layers, pretrained=pretrained)


def get_weight(name: str) -> SimpleNamespace:
    """Weights that are never there to download."""

    def get_state_dict(**_: Any) -> dict[str, Tensor]:
        raise URLError("Name or service not known")

    return SimpleNamespace(url=f"https://example.org/{name}.pth", get_state_dict=get_state_dict)


@contextmanager
def working_torchvision() -> Iterator[ModuleType]:
    """Let ``import torchvision`` work: the installed one if it does, else the stand-in until the end."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        pass
    else:
        yield torchvision
        return
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    package.__path__, package.models = [], models  # type: ignore[attr-defined]
    for item in (alexnet, squeezenet1_1, vgg16, get_weight):
        setattr(models, item.__name__, item)
    sys.modules |= {"torchvision": package, "torchvision.models": models}
    try:
        yield package
    finally:
        # lpips goes too: it holds on to the stand-in
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "lpips")]:
            del sys.modules[name]
