r"""Presets: what published training codes do, as data.

A `Preset` names one code's jump, what its network is told of a noise level, and its grids in their own dtype, rounding
included: in float32 they end at 79.99998474 and 0.0019999996, not at 80 and 0.002, and no value is clamped. Bit for
bit holds on the CPU, for one version and one instruction set of torch: float32 powers and ``linspace`` are not the
same everywhere, in the published codes as little as here. Coefficients follow `Preconditioning`: computed in float64
and rounded once, where the codes compute in the levels' float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from .._checks import check_choice, check_count
from ..noise_levels.network_scalings import cm_c_noise, edm_c_noise
from ..preconditionings.base import Preconditioning
from ..preconditionings.hand_crafted import CMPreconditioning, CTMPreconditioning

_SIGMA_MIN, _SIGMA_MAX, _RHO = 0.002, 80.0, 7.0  # of all codes below; ECT has another sigma_min, but no Karras grid
_ROOTS = _SIGMA_MAX ** (1 / _RHO), _SIGMA_MIN ** (1 / _RHO)


@dataclass(frozen=True, kw_only=True)
class Preset:
    r"""One published code's conventions. `dataclasses.replace` makes variants; its grids keep their own range.

    For a jump to any level (CTM) use `ConsistencyTrajectoryModel`, else `ConsistencyModel` with the preset's
    ``sigma_min``. Either one's ``denoise`` is EDM's denoiser.

    Attributes:
        name: The key in ``PRESETS``.
        source: Repository and paper.
        preconditioning: Makes the jump that the code samples with: a new module at every call.
        training_preconditioning: Makes the jump that it trains; only ECT's differs.
        noise_conditioning: What the network is told of a level, the target level included.
        sigma_min: The cleanest level, which jumps end at.
        sigma_max: The noisiest level.
        sigma_data: Standard deviation of the data.
        rho: Exponent of the grids; None without one.
        num_levels: The usual size of the grids, without the final 0.
        training_levels: Makes the training grid of a given size, noisiest first; None where training levels are
            random: see ``ln_t_normal``.
        sampling_levels: Makes the sampler's grid of a given size, with the final 0 on top.
        multistep_levels: Makes the grid that indices given to multistep samplers refer to; None without one.
        ln_t_normal: Mean and standard deviation of $\ln t$ in training; None where training levels are a grid.

    Examples:
        >>> from analytic_precond import ConsistencyModel
        >>> cm = preset("openai_cm")
        >>> network = lambda x, c_noise: 0 * x
        >>> model = ConsistencyModel(
        ...     network, cm.preconditioning(), cm.sigma_data, cm.sigma_min, noise_conditioning=cm.noise_conditioning
        ... )
        >>> model(torch.ones(1, 2), 0.502)  # 0.25 / (0.5^2 + 0.25)
        tensor([[0.5000, 0.5000]])
    """

    name: str
    source: str
    preconditioning: Callable[[], Preconditioning]
    training_preconditioning: Callable[[], Preconditioning]
    noise_conditioning: Callable[[Tensor], Tensor]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float | None
    num_levels: int
    training_levels: Callable[[int], Tensor] | None
    sampling_levels: Callable[[int], Tensor]
    multistep_levels: Callable[[int], Tensor] | None
    ln_t_normal: tuple[float, float] | None


def preset(name: str) -> Preset:
    """Return the preset of that name; another name raises ValueError with the known ones."""
    check_choice(name, PRESETS, "name")
    return PRESETS[name]


def _karras(ramp: Tensor) -> Tensor:
    """Equation 5 of Karras et al. (2022) in the ramp's dtype; only the two roots are Python floats."""
    start, end = _ROOTS
    return torch.as_tensor((start + ramp * (end - start)) ** _RHO, device="cpu")


def _float32_index_levels(num: int) -> Tensor:
    check_count(num, 2, "num")
    return _karras(torch.arange(num, device="cpu") / torch.tensor(num - 1, dtype=torch.float32, device="cpu"))


def _float32_linspace_levels(num: int) -> Tensor:
    check_count(num, 2, "num")
    return _append_zero(_karras(torch.linspace(0, 1, num, dtype=torch.float32, device="cpu")))


def _edm_sampling_levels(num: int) -> Tensor:
    check_count(num, 2, "num")
    return _append_zero(_karras(torch.arange(num, dtype=torch.float64, device="cpu") / (num - 1)))


def _python_levels(num: int) -> Tensor:
    """The grid in Python's floats, one level at a time."""
    check_count(num, 2, "num")
    start, end = _ROOTS
    levels = [(start + i / (num - 1) * (end - start)) ** _RHO for i in range(num)]
    return torch.tensor(levels, dtype=torch.float64, device="cpu")


def _ect_sampling_levels(num: int) -> Tensor:
    """The one and the two levels that ECT samples at."""
    check_count(num, 1, "num")
    if num > 2:
        raise ValueError(f"num must be 1 or 2, the levels that ECT publishes, got {num}: write your own levels.")
    return _append_zero(torch.tensor([80.0, 0.821], dtype=torch.float64, device="cpu")[:num])


def _append_zero(levels: Tensor) -> Tensor:
    return torch.cat((levels, levels.new_zeros(1)))


_OPENAI_CM = Preset(
    name="openai_cm",
    source="openai/consistency_models; Song et al. 2023, Consistency Models",
    preconditioning=CMPreconditioning,
    training_preconditioning=CMPreconditioning,
    noise_conditioning=cm_c_noise,
    sigma_min=_SIGMA_MIN,
    sigma_max=_SIGMA_MAX,
    sigma_data=0.5,
    rho=_RHO,
    num_levels=40,
    training_levels=_float32_index_levels,
    sampling_levels=_float32_linspace_levels,
    multistep_levels=_python_levels,
    ln_t_normal=None,
)

_SONY_CTM_IMAGENET64 = replace(
    _OPENAI_CM,
    name="sony_ctm_imagenet64",
    source="sony/ctm; Kim et al. 2024, Consistency Trajectory Models",
    preconditioning=CTMPreconditioning,
    training_preconditioning=CTMPreconditioning,
)

_EDM = Preset(
    name="edm",
    source="NVlabs/edm; Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    preconditioning=CTMPreconditioning,
    training_preconditioning=CTMPreconditioning,
    noise_conditioning=edm_c_noise,
    sigma_min=_SIGMA_MIN,
    sigma_max=_SIGMA_MAX,
    sigma_data=0.5,
    rho=_RHO,
    num_levels=18,
    training_levels=None,
    sampling_levels=_edm_sampling_levels,
    multistep_levels=None,
    ln_t_normal=(-1.2, 1.2),
)

_ECT = replace(
    _EDM,
    name="ect",
    source="locuslab/ect; Geng et al. 2024, Consistency Models Made Easy",
    preconditioning=partial(CMPreconditioning, sigma_min=0.003),
    training_preconditioning=partial(CMPreconditioning, sigma_min=0.0),
    sigma_min=0.003,
    rho=None,
    num_levels=2,
    sampling_levels=_ect_sampling_levels,
    ln_t_normal=(-1.1, 2.0),
)

_SONY_CTM_CIFAR10 = replace(_SONY_CTM_IMAGENET64, name="sony_ctm_cifar10", num_levels=18)
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {p.name: p for p in (_OPENAI_CM, _SONY_CTM_CIFAR10, _SONY_CTM_IMAGENET64, _EDM, _ECT)}
)
r"""The presets by name.

- ``openai_cm``: consistency distillation, 40 levels. Multistep sampling returns each answer to level t by adding
  $\sqrt{t^2 - \sigma_{min}^2}$ times noise; it starts from noise of standard deviation 80, not 79.99998.
- ``sony_ctm_cifar10``, ``sony_ctm_imagenet64``: inner ``"edm"``, outer ``"euler"``. Its wrapper of EDM's CIFAR-10
  network takes $250 \ln(t + 10^{-44})$ too and undoes it: around EDM's network itself use ``edm_c_noise``.
- ``edm``: a denoiser, hence trained by ``denoise``; the jump is the Euler step of its sampler, at s = 0 the denoiser.
- ``ect``: trains EDM's denoiser (no shift: ``denoise``), samples with a shift of 0.003, from 80 and once more from
  0.821, to which it returns by adding t times noise. Its second training level follows from t and the stage.
"""
