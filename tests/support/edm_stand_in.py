"""Tiny networks with the interface of NVlabs/edm's, importable so that they can be pickled as its checkpoints are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu

WIDTH = 16


class PositionalEmbedding(nn.Module):
    """From (B,) to (B, 16)."""

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, None] * 2.0 ** torch.arange(8, device=x.device)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """As EDM's UNetBlock: its dropout is a number, and its weights are cast to the input's dtype."""

    def __init__(self, dropout: float, width: int = WIDTH) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = dropout(silu(x + emb[:, :, None, None].to(x.dtype)), self.dropout, self.training)
        return nn.functional.conv2d(x, self.conv.weight.to(x.dtype), self.conv.bias.to(x.dtype), padding=1)


class SongUNet(nn.Module):
    """As training/networks.py: network(x, noise_labels, class_labels, augment_labels=None)."""

    def __init__(
        self, augment: bool = True, dropout: float = 0.0, label_dim: int = 0, width: int = WIDTH, depth: int = 1
    ) -> None:
        super().__init__()
        self.map_noise = PositionalEmbedding()
        self.map_label = nn.Linear(label_dim, WIDTH, bias=False) if label_dim else None
        self.map_augment = nn.Linear(9, WIDTH, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, width)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(dropout, width) for _ in range(depth))
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.exit(silu(h))


class DhariwalUNet(nn.Module):
    """As the other network of training/networks.py: labels enter later, and nothing of augmentation."""

    def __init__(self, label_dim: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.map_noise, self.map_augment = PositionalEmbedding(), None
        self.map_layer0, self.map_layer1 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.map_label = nn.Linear(label_dim, WIDTH, bias=False) if label_dim else None
        self.enter, self.block = nn.Conv2d(3, WIDTH, 3, padding=1), Block(dropout)
        self.out_conv = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        return self.out_conv(silu(self.block(self.enter(x), silu(emb))))


class EDMPrecond(nn.Module):
    """As training/networks.py: net(x, sigma, class_labels)."""

    img_channels = 3

    def __init__(self, model: nn.Module, sigma_data: float = 0.5, label_dim: int = 0, img_resolution: int = 8) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data
        self.label_dim, self.img_resolution = label_dim, img_resolution

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        total = sigma**2 + self.sigma_data**2
        asked = x / total.sqrt()
        F_x = self.model(asked, (sigma.log() / 4).flatten(), class_labels=class_labels)
        assert F_x.dtype == asked.dtype  # as EDM's does
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * F_x.to(torch.float32)
