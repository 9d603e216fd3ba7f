"""What a user's type checker sees; checked by mypy with the package, not run."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import analytic_precond as ap


def plain_function(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + t[:, None] ** 2)


class Conditional(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return plain_function(x, t)


def use(data: Tensor, t: Tensor) -> None:
    stats = ap.estimate_statistics(plain_function, data)
    ap.estimate_statistics(Conditional(), data, condition=lambda label: {"class_labels": label})
    ap.LeastSquaresPreconditioning.fit(lambda x, t: x, data)
    precond = ap.AnalyticPreconditioning(stats)
    c_skip, c_out = precond(5.0, 1.0)
    assert_type(precond(t, 1.0), ap.Scalings)
    assert_type(ap.CMPreconditioning()(t), ap.Scalings)
    assert_type(c_skip * c_out, Tensor)
    student = ap.ConsistencyTrajectoryModel(Conditional(), precond)
    assert_type(student(data, t, 0.002), Tensor)
    assert_type(ap.ConsistencyModel.from_denoiser(Conditional(), precond)(data, t), Tensor)
    on_flow = precond.on_schedule(ap.RectifiedFlowSchedule())
    assert_type(on_flow(t, 0.5), ap.Scalings)
    assert_type(on_flow.jump(data, data, t, 0.5), Tensor)
    assert_type(precond.jump(data, student.denoise(data, t), t, 1.0), Tensor)
