r"""A loss as the mean of weight times distance, and its weights: functions of (t, u, s, sigma_data), in `WEIGHTINGS`.

t is where the student starts, u where the teacher's step ends, s the target; each function looks at what its formula
names. All are for an error of the denoiser or of the jump, in the data's scale, with $d = \sigma_{data}$ and
$c_{out} = t d / \sqrt{t^2 + d^2}$. Published codes have several names for the same weight:

| name here | weight | published as |
|---|---|---|
| ``"uniform"`` | $1$ | CM and CTM ``uniform``, FastGen ``one`` |
| ``"snr"`` | $t^{-2}$ | CM and CTM ``snr``, FastGen ``sigma_sq``, k-diffusion ``snr`` |
| ``"snr+1"`` | $t^{-2} + 1$ | CM and CTM ``snr+1`` |
| ``"karras"`` | $t^{-2} + d^{-2} = c_{out}^{-2}$ | EDM, CM ``karras``, CTM ``karras_weight``, FastGen ``c_out_sq`` |
| ``"truncated-snr"`` | $\max(t^{-2}, 1)$ | CM and CTM ``truncated-snr`` |
| ``"soft-min-snr"`` | $(t^2 + d^2)^{-1}$ | k-diffusion ``soft-min-snr`` |
| ``"inverse-c_out"`` | $c_{out}^{-1}$ | FastGen ``c_out`` |
| ``"inverse-step"`` | $(t - u)^{-1}$ | ECT (its r is u; not its ImageNet branch), iCT, FastGen ``default`` |
| ``"inverse-root-step"`` | $(t - u)^{-1/2}$ | FastGen ``sqrt`` |
| ``"uniform_g"`` | $(1 - s/t)^{-1}$ | CTM ``uniform_g`` with multiplier 1 |
| ``"sq-t-inverse"`` | $\sqrt{t}$ | CTM ``sq-t-inverse``, whose formula is the inverse of its name |

CM is openai/consistency_models, CTM sony/ctm, EDM NVlabs/edm, ECT locuslab/ect, FastGen NVlabs/FastGen, k-diffusion
crowsonkb/k-diffusion; the last weighs the raw network's error, so its weights are divided by $c_{out}^2$ here. iCT is
Song and Dhariwal 2023.

Examples:
    >>> t, u, s = torch.tensor([[0.5], [0.25], [0.002]])
    >>> WEIGHTINGS["karras"](t, u, s, 0.5), WEIGHTINGS["inverse-step"](t, u, s, 0.5)
    (tensor([8.]), tensor([4.]))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .._checks import check_choice, check_positive, may_read

Distance = Callable[[Tensor, Tensor], Tensor]
Weighting = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _widened(formula: Weighting) -> Weighting:
    """Return the formula of levels in float32 at least: 1 / t^2 overflows in float16."""

    def weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
        t, u, s = (level.to(torch.promote_types(level.dtype, torch.float32)) for level in (t, u, s))
        return formula(t, u, s, sigma_data)

    return weighting


_FORMULAS: dict[str, Weighting] = {
    "uniform": lambda t, u, s, d: torch.ones_like(t),
    "snr": lambda t, u, s, d: t**-2,
    "snr+1": lambda t, u, s, d: t**-2 + 1,
    "karras": lambda t, u, s, d: t**-2 + d**-2,  # at initialisation every level then has the same loss
    "truncated-snr": lambda t, u, s, d: (t**-2).clamp(min=1),
    "soft-min-snr": lambda t, u, s, d: 1 / (t**2 + d**2),
    "inverse-c_out": lambda t, u, s, d: (t**-2 + d**-2).sqrt(),
    "inverse-step": lambda t, u, s, d: 1 / (t - u),  # infinite without a step
    "inverse-root-step": lambda t, u, s, d: (t - u).rsqrt(),
    "uniform_g": lambda t, u, s, d: t / (t - s),  # the inverse of the network's share of an Euler jump
    "sq-t-inverse": lambda t, u, s, d: t.sqrt(),
}

WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType({name: _widened(f) for name, f in _FORMULAS.items()})
"""The weightings by name: each maps t, u, s of shape ``(B,)`` and ``sigma_data`` to weights of shape ``(B,)``, in the
levels' dtype but at least float32. A loss takes any of the names, or any other such function."""


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of.

    Attributes:
        loss: The mean over the batch, to call ``backward`` on. Scalar.
        per_sample: What it is the mean of, weight times distance. Shape ``(B,)``.
        terms: ``"distance"`` and ``"weight"``, shape ``(B,)`` and without gradient; ``"estimate"`` and ``"target"``,
            the images that were compared, the first with its gradient.
        times: The noise levels t (and u, s) of each sample, by name.
    """

    loss: Tensor
    per_sample: Tensor
    terms: Mapping[str, Tensor]
    times: Mapping[str, Tensor]

    def check(self) -> None:
        """Raise a ValueError that names the noise levels of NaN or infinite losses, if any (reads the values)."""
        bad = (~torch.isfinite(self.per_sample)).nonzero().flatten().tolist()
        if bad:
            where = ", ".join(f"{name} = {value[bad[0]].item():.6g}" for name, value in self.times.items())
            raise ValueError(
                f"the loss must be finite, got {self.per_sample[bad[0]].item()} at {where} (sample {bad[0]}; "
                f"{len(bad)} of {len(self.per_sample)} samples): look at the network's output there, at its precision "
                f"(fp16 ends at 65504), at the teacher and at the learning rate."
            )


@dataclass
class WeightedDistance:
    """The distance of two batches, weighted by their noise levels; the arguments are those of the losses."""

    distance: Distance
    weighting: str | Weighting
    sigma_data: float

    def __post_init__(self) -> None:
        if isinstance(self.weighting, str):
            check_choice(self.weighting, WEIGHTINGS, "weighting")
        check_positive(self.sigma_data, "sigma_data")

    def __call__(self, estimate: Tensor, target: Tensor, **times: Tensor) -> Loss:
        """Return the mean over the batch; of the noise levels, shape ``(B,)``, there may be u and s beside t."""
        distances = self.distance(estimate, target)
        _check_per_sample(distances, estimate, "distance", "average over the elements of each sample only")
        weighting = WEIGHTINGS[self.weighting] if isinstance(self.weighting, str) else self.weighting
        t = times["t"]
        weight = weighting(t, times.get("u", t), times.get("s", t), self.sigma_data)
        _check_per_sample(weight, estimate, "weighting", "compute it of t, whose shape it has")
        weight = weight.to(distances.dtype)
        # inductor cannot differentiate a product with ones that the graph itself made (torch 2.13)
        per_sample = distances if self.weighting == "uniform" else weight * distances
        terms = {"distance": distances.detach(), "weight": weight.detach(), "estimate": estimate, "target": target}
        result = Loss(per_sample.mean(), per_sample, terms, times)
        if may_read(per_sample):
            result.check()
        return result


def _check_per_sample(values: object, x: Tensor, name: str, advice: str) -> None:
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the {name} must return one number per sample, shape {tuple(x.shape[:1])}, got {got}: {advice}."
        )
