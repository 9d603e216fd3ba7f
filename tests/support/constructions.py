"""Students around raw networks, made the other way: from a denoiser that puts EDM's scalings around the network.

Their numbers are the same, so whatever is tested of the one construction is tested of the other too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import analytic_precond as ap

Told = Callable[[Tensor], Tensor] | None


class TargetByKeyword(nn.Module):
    """A network of two times, which is told the second one by name."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, c_t: Tensor, *, c_target: Tensor, **condition: Any) -> Any:
        return self.network(x, c_t, c_target, **condition)


class Scalings:
    """EDM's, with what the network is told."""

    def __init__(self, sigma_data: float, told: Told) -> None:
        self.edm, self.told = ap.EDMPreconditioning(sigma_data), told

    def __call__(self, t: Tensor) -> tuple[Tensor, ...]:
        edm = self.edm(t)
        return edm if self.told is None else (*edm[:3], self.told(t))


def denoiser(network: Any, sigma_data: float, told: Told) -> Any:
    return ap.NetworkDenoiser(network, Scalings(sigma_data, told)) if callable(network) else network  # type: ignore[arg-type]


def make_students_from_denoisers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the constructors make their students by ``from_denoiser``."""
    one_time, two_times = ap.ConsistencyModel.from_denoiser, ap.ConsistencyTrajectoryModel.from_denoiser

    def consistency_model(
        self: Any, network: Any, precond: Any, sigma_data: float = 0.5, sigma_min: Any = None,
        noise_conditioning: Told = None,
    ) -> None:  # fmt: skip
        made = one_time(denoiser(network, sigma_data, noise_conditioning), precond, sigma_min)
        self.__dict__.update(made.__dict__)

    def trajectory_model(
        self: Any, network: Any, precond: Any, sigma_data: float = 0.5, noise_conditioning: Told = None
    ) -> None:
        made = two_times(denoiser(TargetByKeyword(network), sigma_data, noise_conditioning), precond, "c_target")
        self.__dict__.update(made.__dict__)

    monkeypatch.setattr(ap.ConsistencyModel, "__init__", consistency_model)
    monkeypatch.setattr(ap.ConsistencyTrajectoryModel, "__init__", trajectory_model)


def raw(student: Any) -> Any:
    """The network behind the wrappers of either construction."""
    network = student.network
    while isinstance(network, ap.NetworkDenoiser | TargetByKeyword):
        network = network.network
    return network
