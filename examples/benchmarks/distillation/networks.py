"""The networks: the quickstart's U-Net for any image, and a multilayer perceptron for points of the plane."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from configurations import Problem
from torch import Tensor, nn

import analytic_precond as ap

sys.path.insert(0, str(Path(__file__).parents[2]))
from quickstart import NetworkTeacher, UNet


class ImageUNet(UNet):
    """The quickstart's U-Net for any number of channels."""

    def __init__(self, channels: int, width: int, two_times: bool = False) -> None:
        super().__init__(width, max(64, 2 * width), two_times)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)


class MLP(nn.Module):
    """Three hidden layers, each told the noise levels."""

    def __init__(self, width: int, two_times: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-1, 2, 16))
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        layers = (nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_target = nn.Sequential(*layers) if two_times else None
        self.enter = nn.Linear(2, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, c_noise: Tensor, c_target: Tensor | None = None) -> Tensor:
        """Return the raw output F. Shapes: ``x`` (B, 2), ``c_noise`` and ``c_target`` (B,)."""
        embedding = self.embed(self._waves(c_noise))
        if self.embed_target is not None and c_target is not None:
            embedding = embedding + self.embed_target(self._waves(c_target))
        h = self.enter(x)
        for layer in self.hidden:
            h = h + layer(F.silu(h + embedding))
        return self.leave(F.silu(h))

    def _waves(self, c_noise: Tensor) -> Tensor:
        phase = c_noise[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)


def build_network(problem: Problem, shape: torch.Size, seed: int, two_times: bool = False) -> nn.Module:
    """Return a network for samples of a shape, with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(shape) == 1:
            return MLP(problem.width, two_times)
        return ImageUNet(shape[0], problem.width, two_times)


def student_network(problem: Problem, teacher: NetworkTeacher, shape: torch.Size, seed: int, times: int) -> nn.Module:
    """Return a network that starts as the teacher, whatever target it is told (``times`` is 2) or is not (1)."""
    network = build_network(problem, shape, seed, two_times=times == 2)
    ap.initialize_from_teacher(network, teacher.network, zero=["embed_target.2"] if times == 2 else [])
    return network
