"""Shared dropout masks, moving averages and the balance of two losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from global_rng import global_rng_untouched
from torch import nn
from torch.nn.functional import dropout

import analytic_precond as ap
from analytic_precond.distillation.denoising import adaptive_balance
from analytic_precond.distillation.student_passes import SharedDropout
from analytic_precond.students.weights import exponential_moving_average

ONES = torch.ones(400)


@pytest.fixture(autouse=True)
def _seeded_global_generator() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_masks_are_shared_and_the_generator_moves_on_by_one_pass() -> None:
    state = torch.get_rng_state()
    expected = [dropout(ONES), dropout(ONES)]
    torch.set_rng_state(state)
    masks = SharedDropout()
    with masks:
        first = dropout(ONES)
    for _ in range(3):
        with masks:
            assert torch.equal(dropout(ONES), first)
            dropout(ONES)  # a longer pass
    assert torch.equal(first, expected[0])
    assert torch.equal(dropout(ONES), expected[1])


def test_masks_differ_between_steps_and_an_exception_restores_the_generator() -> None:
    masks = SharedDropout()
    with masks:
        first = dropout(ONES)
    with SharedDropout():
        assert not torch.equal(dropout(ONES), first)
    state = torch.get_rng_state()
    with pytest.raises(TypeError), masks:
        dropout(dropout(ONES), p="half")  # type: ignore[arg-type]  # after one that worked
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_masks_are_shared_on_every_cuda_device() -> None:
    masks = SharedDropout()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with masks:
        first = [dropout(ONES.to(device)) for device in devices]
    with masks:
        for device, mask in zip(devices, first, strict=True):
            assert torch.equal(dropout(ONES.to(device)), mask)


def test_average_follows_the_recursion_and_resumes() -> None:
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = exponential_moving_average(student, 0.9)
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in student.parameters())

    expected = None
    for step in range(5):
        with torch.no_grad():
            student[0].weight.add_(torch.full((3, 2), step + 1.0))
            student[1].running_mean.fill_(step)
        average.update_parameters(student)
        weight = student[0].weight.detach().double()
        expected = weight.clone() if expected is None else 0.9 * expected + 0.1 * weight
        torch.testing.assert_close(average.module[0].weight.double(), expected, rtol=1e-6, atol=0)  # float32
        assert torch.equal(average.module[1].running_mean, student[1].running_mean)
        if step == 2:
            saved = copy.deepcopy(average.state_dict())
            resumed = exponential_moving_average(student, 0.9)
            resumed.load_state_dict(saved)
        if step > 2:
            resumed.update_parameters(student)
    for name, value in average.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_average_of_a_student_is_called_as_the_student_and_keeps_its_tables() -> None:
    levels = ap.log_noise_levels(16)
    precond = ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + levels**2), 0 * levels)
    network = nn.Linear(2, 2)
    student = ap.ConsistencyTrajectoryModel(lambda x, c_t, c_s: network(x), precond)
    student.network = _Network()
    average = exponential_moving_average(student, 0.5)
    average.update_parameters(student)
    x = torch.ones(3, 2)
    assert torch.equal(average(x, 5.0, 1.0), student(x, 5.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(average.module.precond.buffers(), precond.buffers(), strict=True))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, c_t: torch.Tensor, c_s: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_average_refuses_what_it_cannot_average() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        exponential_moving_average(lambda x: x, 0.9)  # type: ignore[arg-type]
    for decay in (-0.1, 1.1, True, "0.9", float("nan")):
        with pytest.raises(ValueError, match="decay must be a number in"):
            exponential_moving_average(nn.Linear(1, 1), decay)  # type: ignore[arg-type]


def test_balance_is_the_ratio_of_gradient_norms() -> None:
    phi = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference, other = (phi**2).sum(), 3 * phi[0] + 4 * phi[1]
    weight = adaptive_balance(reference, other, phi)
    # gradients (2, 4) and (3, 4); the floor 1e-4 is the rule's own
    assert weight.item() == pytest.approx(math.sqrt(20) / (5 + 1e-4), rel=1e-12)
    assert not weight.requires_grad
    (reference + weight * other).backward()  # both graphs are still there
    torch.testing.assert_close(phi.grad, torch.tensor([2 + 3 * weight, 4 + 4 * weight], dtype=torch.float64))


def test_balance_is_bounded() -> None:
    phi = torch.ones(1, requires_grad=True)
    assert adaptive_balance(1e6 * phi.sum(), 0 * phi.sum(), phi).item() == 1e4
    assert adaptive_balance(0 * phi.sum(), phi.sum(), phi).item() == 0.0


def test_balance_refuses_losses_without_a_gradient() -> None:
    phi = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"reference must be a scalar tensor, got dict: pass the \.loss of a Loss"):
        adaptive_balance({}, phi.sum(), phi)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"other must be a scalar loss, got shape \(2,\)"):
        adaptive_balance(phi.sum(), phi, phi)
    for other in (torch.ones(1, requires_grad=True).sum(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="other must depend on the parameter"):
            adaptive_balance(phi.sum(), other, phi)


def test_nothing_touches_the_global_generators() -> None:
    with global_rng_untouched():
        student = nn.utils.skip_init(nn.Linear, 1, 1)
        nn.init.ones_(student.weight)
        nn.init.ones_(student.bias)
        exponential_moving_average(student, 0.9).update_parameters(student)
        adaptive_balance(student.weight.sum(), student.weight.sum(), student.weight)
        masks = SharedDropout()
        for _ in range(2):
            with masks:
                pass
