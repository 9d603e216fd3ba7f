r"""What all losses share: noisy data, a weighted distance, and the result with its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_choice, check_positive, check_tensor, may_read
from ..noise_levels.per_sample import expand_to
from .weightings import WEIGHTINGS, Weighting

Distance = Callable[[Tensor, Tensor], Tensor]


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


def check_data(x_0: Tensor, noise: Tensor) -> None:
    """Refuse anything but two batches of one shape."""
    for value, name in ((x_0, "x_0"), (noise, "noise")):
        check_tensor(value, name)
    if x_0.shape != noise.shape or x_0.numel() == 0:
        raise ValueError(
            f"x_0 and noise must be batches of one shape (B, ...), got {tuple(x_0.shape)} and {tuple(noise.shape)}: "
            f"draw noise with torch.randn(x_0.shape, generator=...)."
        )


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t, computed at the levels' precision, in float32 at least: half precision cannot hold x_0 + 0.002 n."""
    return (x_0 + expand_to(t, x_0) * noise).to(torch.promote_types(x_0.dtype, torch.float32))


def weighted_loss(
    estimate: Tensor,
    target: Tensor,
    times: Mapping[str, Tensor],
    distance: Distance,
    weighting: str | Weighting,
    sigma_data: float,
) -> Loss:
    """Return the mean of weight times distance.

    Args:
        estimate: What is trained. Shape ``(B, ...)``.
        target: What it should be. Shape of ``estimate``.
        times: The noise levels t, and u and s if there are, by name. Shape ``(B,)``.
        distance: Maps two batches to one number per sample, shape ``(B,)``.
        weighting: A name from ``WEIGHTINGS``, or a function of t, u, s and ``sigma_data``.
        sigma_data: Standard deviation of the data, for the weighting.

    Raises:
        ValueError: If the distance or the weighting returns another shape or (on the CPU) something that is not
            finite.
    """
    if isinstance(weighting, str):
        check_choice(weighting, WEIGHTINGS, "weighting")
        weighting = WEIGHTINGS[weighting]
    check_positive(sigma_data, "sigma_data")
    distances = distance(estimate, target)
    if not isinstance(distances, Tensor) or distances.shape != estimate.shape[:1]:
        got = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
        raise ValueError(
            f"the distance must return one number per sample, shape {tuple(estimate.shape[:1])}, got {got}: average "
            f"over the elements of each sample only."
        )
    t = times["t"]
    weight = weighting(t, times.get("u", t), times.get("s", t), sigma_data)
    if not isinstance(weight, Tensor) or weight.shape != t.shape:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"the weighting must return one number per sample, shape {tuple(t.shape)}, got {got}.")
    weight = weight.to(distances.dtype)
    per_sample = weight * distances
    terms = {"distance": distances.detach(), "weight": weight.detach(), "estimate": estimate, "target": target}
    result = Loss(per_sample.mean(), per_sample, terms, dict(times))
    if may_read(per_sample):
        result.check()
    return result
