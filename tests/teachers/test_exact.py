"""Closed-form denoisers against Tweedie's formula on torch.distributions, and against each other."""

from __future__ import annotations

import pytest
import torch
from problems import gaussian_problem
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import analytic_precond as ap

LEVELS = [80.0, 2.0, 0.3, 0.02, 0.002]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(num: int, t: float) -> Tensor:
    return torch.full((num,), t, dtype=torch.float64)


def tweedie(means: Tensor, variances: Tensor, weights: Tensor, x: Tensor, t: float) -> Tensor:
    """D = x + t^2 grad log q_t, with the density and its gradient from torch alone."""
    components = Independent(Normal(means.flatten(1), (variances.flatten(1) + t**2).sqrt()), 1)
    x = x.clone().requires_grad_()
    log_q = MixtureSameFamily(Categorical(weights), components).log_prob(x.flatten(1))
    (score,) = torch.autograd.grad(log_q.sum(), x)
    return x.detach() + t**2 * score


@pytest.mark.parametrize("t", LEVELS)
def test_mixture_obeys_tweedie(t: float) -> None:
    means, variances = rand(4, 2, 3), rand(4, 2, 3, seed=1).square() + 0.01
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    x = means.repeat(2, 1, 1) + (0.3 + t) * rand(8, 2, 3, seed=2)
    D = ap.GaussianMixtureDenoiser(means, variances, weights)(x, level(8, t))
    # 1e-10: at t = 80 Tweedie subtracts numbers of size 80 t^2 / t^2
    torch.testing.assert_close(D, tweedie(means, variances, weights, x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", LEVELS)
def test_gaussian_is_a_mixture_of_one(t: float) -> None:
    variances, mean = rand(2, 3).square(), rand(2, 3, seed=1)
    x = mean + (1 + t) * rand(5, 2, 3, seed=2)
    mixture = ap.GaussianMixtureDenoiser(mean[None], variances[None])
    torch.testing.assert_close(ap.GaussianDenoiser(variances, mean)(x, level(5, t)), mixture(x, level(5, t)))


def test_gaussian_variances_broadcast_and_flow_is_its_ode_solution() -> None:
    x = rand(3, 4, 5)
    per_channel = ap.GaussianDenoiser(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], 0.5)
    full = ap.GaussianDenoiser(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 5), torch.full((4, 5), 0.5))
    torch.testing.assert_close(per_channel(x, torch.ones(3)), full(x, torch.ones(3)))

    problem, t = gaussian_problem(), 0.7
    x_t = rand(2, 6)
    h = 1e-5  # central difference in s: error h^2
    slope = (problem.flow(x_t, t, t + h) - problem.flow(x_t, t, t - h)) / (2 * h)
    velocity = (x_t - problem.denoiser(x_t, level(2, t))) / t
    torch.testing.assert_close(slope, velocity, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("chunk_elements", [2**22, 64])
def test_empirical_is_a_mixture_of_points(t: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analytic_precond.teachers.exact._CHUNK_ELEMENTS", chunk_elements)
    data = rand(50, 2, 3)
    x = data[:7] + t * rand(7, 2, 3, seed=1)
    points = ap.GaussianMixtureDenoiser(data, 0.0)
    # the mixture forms |x - y|^2 / t^2, here up to 1e6, whose rounding moves a weight by 1e-10
    torch.testing.assert_close(ap.EmpiricalDenoiser(data)(x, level(7, t)), points(x, level(7, t)), rtol=1e-9, atol=1e-9)


def test_empirical_is_safe_at_small_noise_and_large_data() -> None:
    data = torch.rand(10_000, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data[1] = data[0]  # a duplicate shares the weight
    teacher = ap.EmpiricalDenoiser(data)
    x = data[:4] + 0.002 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    # at t = 0.002 every other point is e^-1e7 away: the answer is the data point, rounded to float32
    torch.testing.assert_close(teacher(x, torch.full((4,), 0.002)), data[:4])
    far = torch.full((1, 3, 16, 16), 1e4)
    nearest = data.double().flatten(1).sum(1).argmax()  # of the direction (1, ..., 1)
    torch.testing.assert_close(teacher(far, torch.tensor([0.002])), data[nearest][None])


@pytest.mark.parametrize(
    "teacher",
    [
        ap.GaussianDenoiser(torch.tensor([1.0, 0.1]), 0.3),
        ap.GaussianMixtureDenoiser(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.1, 0.2])),
        ap.EmpiricalDenoiser(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.2, 0.1]])),
    ],
    ids=["gaussian", "mixture", "empirical"],
)
class TestEveryDenoiser:
    def test_differentiable_both_ways(self, teacher: ap.Denoiser) -> None:
        x, t = rand(2, 2).requires_grad_(), torch.tensor([0.7, 0.9], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(teacher, (x, t), check_forward_ad=True)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_answers_in_the_input_dtype(self, teacher: ap.Denoiser, dtype: torch.dtype) -> None:
        x = torch.tensor([[0.5, 0.25]], dtype=dtype)
        D = teacher(x, torch.tensor([0.5], dtype=dtype))
        assert D.dtype == dtype
        exact = teacher(x.double(), torch.tensor([0.5]))
        torch.testing.assert_close(D.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)

    def test_is_a_denoiser_that_keeps_precision_under_half(self, teacher: torch.nn.Module) -> None:
        assert isinstance(teacher, ap.Denoiser)
        x, t = rand(3, 2), torch.tensor([0.1, 1.0, 10.0])
        assert torch.equal(teacher(x, t), teacher.half()(x, t))
