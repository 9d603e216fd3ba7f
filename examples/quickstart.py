"""From a teacher to its preconditioning, on real images and an ordinary CPU, in about a minute.

Two teachers of 16x16 colour patches from scikit-learn's two photographs: the ideal denoiser, known in closed form,
and a small U-Net trained on the spot. For both: measure the statistics, save and load them, build the preconditioning,
compare it with CTM's, and draw it all. Run it with ``make quickstart`` or ``python examples/quickstart.py``.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import trange

import analytic_precond as ap


def load_patches(size: int = 16, stride: int = 8) -> Tensor:
    """Cut the photographs, shrunk by 2, into patches in [-1, 1]. Shape ``(N, 3, size, size)``."""
    patches = []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).permute(2, 0, 1).float() / 127.5 - 1
        windows = F.avg_pool2d(image, 2).unfold(1, size, stride).unfold(2, size, stride)
        patches.append(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size))
    return torch.cat(patches)


class ResidualBlock(nn.Module):
    """Two convolutions, told the noise level in between."""

    def __init__(self, channels_in: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels_in), nn.GroupNorm(8, channels)])
        self.first = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.shift = nn.Linear(embedding, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        nn.init.zeros_(self.second.weight)  # the block begins as its skip connection

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the next features, with ``channels`` channels."""
        h = self.first(F.silu(self.norms[0](x))) + self.shift(embedding)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norms[1](h)))


class UNet(nn.Module):
    """A U-Net of three resolutions with 0.2 million parameters, told one noise level or (a student) two."""

    def __init__(self, w: int = 16, e: int = 64, two_times: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-1, 1, e // 4))
        self.embed = nn.Sequential(nn.Linear(e // 2, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.embed_target = nn.Sequential(nn.Linear(e // 2, e), nn.SiLU(), nn.Linear(e, e)) if two_times else None
        self.enter = nn.Conv2d(3, w, 3, padding=1)
        self.down = nn.ModuleList([ResidualBlock(w, w, e), ResidualBlock(w, 2 * w, e), ResidualBlock(2 * w, 4 * w, e)])
        self.middle = ResidualBlock(4 * w, 4 * w, e)
        self.up = nn.ModuleList([ResidualBlock(4 * w, 2 * w, e), ResidualBlock(2 * w, w, e), ResidualBlock(w, w, e)])
        self.leave = nn.Conv2d(w, 3, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, c_noise: Tensor, c_target: Tensor | None = None) -> Tensor:
        """Return the raw output F. Shapes: ``x`` (B, 3, H, W), ``c_noise`` and ``c_target`` (B,)."""
        embedding = self.embed(self._waves(c_noise))
        if self.embed_target is not None and c_target is not None:
            embedding = embedding + self.embed_target(self._waves(c_target))
        fine = self.down[0](self.enter(x), embedding)
        medium = self.down[1](F.avg_pool2d(fine, 2), embedding)
        coarse = self.middle(self.down[2](F.avg_pool2d(medium, 2), embedding), embedding)
        medium = medium + F.interpolate(self.up[0](coarse, embedding), scale_factor=2.0)
        fine = fine + F.interpolate(self.up[1](medium, embedding), scale_factor=2.0)
        return self.leave(F.silu(self.up[2](fine, embedding)))

    def _waves(self, c_noise: Tensor) -> Tensor:
        phase = c_noise[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)


class NetworkTeacher(nn.Module):
    """A raw network inside EDM's preconditioning: a denoiser ``D(x, t)``."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.edm = network, ap.EDMPreconditioning(sigma_data)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the denoised images. Shapes: ``x`` (B, 3, H, W), ``t`` (B,)."""
        *factors, c_noise = self.edm(t)
        c_skip, c_out, c_in = (ap.expand_to(c, x) for c in factors)
        return c_skip * x + c_out * self.network(c_in * x, c_noise)


def train_teacher(patches: Tensor, sigma_data: float, steps: int = 600, batch_size: int = 32) -> NetworkTeacher:
    """Train by denoising score matching with EDM's weighting; its log-normal noise levels reach from 0.01 to 80."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = NetworkTeacher(UNet(), sigma_data).to(patches.device)
    optimizer = torch.optim.Adam(teacher.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    average = 1.0  # what F = 0 scores
    bar = trange(steps, desc="training the network", unit=" steps")
    for _ in bar:
        x_0 = patches[torch.randint(len(patches), (batch_size,), generator=generator)]
        shares = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        t = (2.2 * torch.special.ndtri(shares)).exp().to(patches)  # each batch has levels of all sizes
        x_t = x_0 + ap.expand_to(t, x_0) * torch.randn(x_0.shape, generator=generator).to(patches)
        weight = ap.expand_to(teacher.edm(t).c_out ** -2, x_0)
        loss = (weight * (teacher(x_t, t) - x_0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average += 0.02 * (loss.item() - average)
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
    return teacher.eval()


def print_table(preconditionings: dict[str, ap.Preconditioning]) -> None:
    """Print c_skip and c_out of six jumps."""
    print("\n" + " " * 14 + "".join(f"{name:>24}" for name in preconditionings))
    print(f"{'t -> s':>14}" + f"{'c_skip':>13}{'c_out':>11}" * len(preconditionings))
    for t, s in [(80.0, 0.002), (80.0, 5.0), (20.0, 1.0), (5.0, 1.0), (1.0, 0.1), (0.5, 0.002)]:
        pairs = [precond(t, s) for precond in preconditionings.values()]
        print(f"{f'{t:g} -> {s:g}':>14}" + "".join(f"{c_skip:13.4g}{c_out:11.5f}" for c_skip, c_out in pairs))


def main() -> None:
    """Run the whole pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"), help="folder for files and figures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a network gains little from more, and loses much where the machine is busy

    patches = load_patches()
    sigma_data = patches.std().item()
    teachers = {"ideal denoiser": ap.EmpiricalDenoiser(patches), "network": train_teacher(patches, sigma_data)}

    statistics, preconditionings = {}, {"CTM": ap.CTMPreconditioning(sigma_data=sigma_data)}
    for name, teacher in teachers.items():
        path = output / f"{name.replace(' ', '_')}.safetensors"
        # a third of the levels that the paper takes give the table below to 2e-5
        ap.estimate_statistics(teacher, patches, ap.log_noise_levels(40), num_samples=256, description=name).save(path)
        statistics[name] = ap.TeacherStatistics.load(path)  # all that a student needs of its teacher
        preconditionings[name] = ap.AnalyticPreconditioning(statistics[name], sigma_data=sigma_data)

    print_table(preconditionings)
    ap.plot_statistics(statistics, sigma_data).savefig(output / "statistics.png", dpi=150)
    ap.plot_preconditioning(preconditionings).savefig(output / "preconditioning.png", dpi=150)
    print(f"\nstatistics (.safetensors) and figures (.png) are in {output.resolve()}")


if __name__ == "__main__":
    main()
