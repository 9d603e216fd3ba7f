"""Tiny networks with the interface of NVlabs/edm's, importable so that they can be pickled as its checkpoints are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """From (B,) to (B, 16)."""

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, None] * 2.0 ** torch.arange(8)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class SongUNet(nn.Module):
    """As training/networks.py: network(x, noise_labels, class_labels, augment_labels=None)."""

    def __init__(self, augment: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.map_noise = PositionalEmbedding()
        self.map_augment = nn.Linear(9, 16, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.enter, self.exit = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(nn.functional.silu(self.map_layer0(emb)))
        return self.exit(self.dropout(nn.functional.silu(self.enter(x) + emb[:, :, None, None])))


class EDMPrecond(nn.Module):
    """As training/networks.py: net(x, sigma, class_labels)."""

    label_dim = 0

    def __init__(self, model: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        F_x = self.model(x / total.sqrt(), (sigma.log() / 4).flatten(), class_labels=class_labels)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * F_x
