"""The paper's own experiments, as data; what it leaves open is CTM's, whose code it builds on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import Tensor

from .._checks import check_choice, check_count
from ..noise_levels.grids import karras_noise_levels
from ..noise_levels.random_levels import sample_karras_noise_levels, sample_lognormal_noise_levels


@dataclass(frozen=True)
class PaperExperiment:
    """One experiment of the paper. Its abstract and published summaries leave some settings open.

    The paper's full text was not at hand: where it differs, it is right. ``sources`` says of each setting where it is
    from; `dataclasses.replace` changes any.

    Attributes:
        name: The key in ``PAPER_EXPERIMENTS``.
        dataset: The images, of this ``resolution``.
        resolution: Height and width.
        class_conditional: Whether networks are given labels. For ImageNet inferred from EDM's published teacher.
        teacher: Where the teacher comes from.
        num_levels: Size N of the training grid.
        ode_solver: What takes the teacher's steps.
        max_ode_steps: Largest number of its steps in one jump.
        optimizer: Name of the optimiser.
        learning_rate: The optimiser's.
        target_ema: Decay of the student's average behind the stop-gradient, in the training target.
        inner_target: What jumps from u to s in the training target: the ``"student"`` or its ``"average"``.
        ema: Decay of the average that is evaluated.
        batch_size: Images per iteration.
        iterations: Iterations of training.
        distance: What compares two images.
        denoising_weight: Weight of the denoising loss, on top of `adaptive_balance`.
        dropout: The student's.
        flips: Share of the training images that are mirrored.
        network_dtype: The network's precision.
        statistics_levels: Noise levels that the coefficients are estimated at.
        statistics_samples: Noisy samples per level for it.
        gpus: Cards that the paper trained on.
        gpu: Their kind.
        days: How long it took.
        sources: Where the settings are from: ``"paper"``, ``"sony/ctm"`` (its code), or ``"teacher"`` (EDM's command
            line for the published one). Also of the two methods, by name.

    Examples:
        >>> experiment = paper_experiment("cifar10_unconditional")
        >>> experiment.batch_size, experiment.sources["batch_size"], experiment.sources["optimizer"]
        (256, 'paper', 'sony/ctm')
    """

    name: str
    dataset: str
    resolution: int
    class_conditional: bool
    num_levels: int
    max_ode_steps: int
    batch_size: int
    iterations: int
    gpus: int
    days: float
    dropout: float
    teacher: str = "EDM (Karras et al. 2022)"
    ode_solver: str = "heun"
    optimizer: str = "radam"
    learning_rate: float = 4e-4
    target_ema: float = 0.999
    inner_target: str = "student"
    ema: float = 0.999
    distance: str = "lpips"
    denoising_weight: float = 1.0
    flips: float = 0.5
    network_dtype: torch.dtype = torch.float16
    statistics_levels: int = 120
    statistics_samples: int = 4096
    gpu: str = "A800"

    @property
    def sources(self) -> Mapping[str, str]:
        """Where each setting is from."""
        own = {field.name: "paper" for field in fields(self)} | dict.fromkeys(_FROM_CTM, "sony/ctm")
        own["dropout"] = "teacher" if self.dataset == "FFHQ" else "sony/ctm"  # which has no FFHQ
        return MappingProxyType(own)

    def sampling_levels(self, steps: int) -> Tensor:
        """Return where samples in so many steps stop on their way from 80 to 0.002; sony/ctm's ``exact`` sampler.

        Karras's grid of one level more: two steps go by 2.515. The paper's own levels are not known.

        Args:
            steps: Number of jumps, at least 1.

        Returns:
            Decreasing noise levels for `sample_deterministic`. Shape ``(steps + 1,)``.

        Raises:
            ValueError: If ``steps`` is below 1.

        Examples:
            >>> paper_experiment("ffhq64").sampling_levels(2)
            tensor([8.0000e+01, 2.5152e+00, 2.0000e-03], dtype=torch.float64)
        """
        check_count(steps, 1, "steps")
        return karras_noise_levels(steps + 1)

    def sample_denoising_levels(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Return noise levels for the denoising loss, of shape ``(B,)``, drawn as by sony/ctm.

        Half have $\ln t \sim N(-1.2, 1.2^2)$, the others are spread as Karras's grid, from 80 over 70 % of its ramp,
        to 0.318: large noise is where a student of few steps begins. The loss's weight is EDM's, ``"karras"``.

        Args:
            batch: Number of levels B, at least 1.
            generator: Source of the random numbers. Default: torch's own.

        Raises:
            ValueError: If ``batch`` is below 1.

        Examples:
            >>> t = paper_experiment("ffhq64").sample_denoising_levels(8, torch.Generator().manual_seed(0))
            >>> t.shape, bool(t[4:].min() > 0.318)
            (torch.Size([8]), True)
        """
        check_count(batch, 1, "batch", "Pass len(x).")
        levels = [] if batch == 1 else [sample_lognormal_noise_levels(batch // 2, generator=generator)]
        levels.append(sample_karras_noise_levels(batch - batch // 2, _LOWEST, generator=generator))
        return torch.cat(levels)


_LOWEST = (0.3 * 80 ** (1 / 7) + 0.7 * 0.002 ** (1 / 7)) ** 7  # 70 % of Karras's ramp
_FROM_CTM = (
    "optimizer", "inner_target", "denoising_weight", "flips", "sampling_levels", "sample_denoising_levels",
)  # fmt: skip


# name, dataset, resolution, class_conditional, num_levels, max_ode_steps, batch_size, iterations, gpus, days, dropout
_EXPERIMENTS = (
    PaperExperiment("cifar10_unconditional", "CIFAR-10", 32, False, 18, 17, 256, 200_000, 4, 5.0, 0.13),
    PaperExperiment("cifar10_conditional", "CIFAR-10", 32, True, 18, 17, 512, 150_000, 8, 4.0, 0.13),
    PaperExperiment("ffhq64", "FFHQ", 64, False, 18, 17, 256, 150_000, 8, 5.0, 0.05),
    PaperExperiment("imagenet64", "ImageNet", 64, True, 40, 20, 2048, 60_000, 32, 8.0, 0.0),
)

PAPER_EXPERIMENTS: Mapping[str, PaperExperiment] = MappingProxyType({e.name: e for e in _EXPERIMENTS})
"""The paper's experiments by name."""


def paper_experiment(name: str) -> PaperExperiment:
    """Return the paper's experiment of that name; another name raises ValueError with the known ones."""
    check_choice(name, PAPER_EXPERIMENTS, "name")
    return PAPER_EXPERIMENTS[name]
