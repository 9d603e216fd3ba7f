"""Jumps of one preconditioning that become another's while a student trains."""

import torch
from torch import Tensor, nn

import analytic_precond as ap

DURATION = 1 / 4  # of the training: on the plateau, which begins later, nothing changes any more


class AnnealedPreconditioning(ap.Preconditioning):
    """Between two preconditionings: coefficients linearly, and the logarithm of the level that the network is told.

    Args:
        start: Where it starts, e.g. with shifted jumps.
        end: Where it ends; asks the network at t.

    Attributes:
        share: 0 at the start, 1 at the end; a buffer, so that changing it waits for no device.
    """

    told_lower_level = True

    def __init__(self, start: ap.Preconditioning, end: ap.Preconditioning) -> None:
        super().__init__(end.sigma_data)
        self.start, self.end = start, end
        self.register_buffer("share", torch.zeros((), dtype=torch.float64))

    @property
    def sigma_max(self) -> float:
        """The smaller of both."""
        return min(self.start.sigma_max, self.end.sigma_max)

    @property
    def sigma_min(self) -> float:
        """The larger of both."""
        return max(self.start.sigma_min, self.end.sigma_min)

    def coefficients(self, t: Tensor, s: Tensor) -> ap.Scalings:
        """Return ``(1 - share) c_start + share c_end``."""
        pairs = zip(self.start.coefficients(t, s), self.end.coefficients(t, s), strict=True)
        return ap.Scalings(*(torch.lerp(first, last, self.share.to(last)) for first, last in pairs))

    def network_level(self, t: Tensor, s: Tensor | float) -> Tensor:
        """Return ``q (t / q)^share``."""
        q = self.start.network_level(t, s)
        return q * (t / q) ** self.share.to(q)


def anneal(model: nn.Module, progress: float) -> None:
    """Tell a model's preconditioning how far the training is, from 0 to 1."""
    for module in model.modules():
        if isinstance(module, AnnealedPreconditioning):
            module.share.fill_(min(1.0, progress / DURATION))
