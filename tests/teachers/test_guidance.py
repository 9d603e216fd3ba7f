"""Classifier-free guidance against its two formulas, by hand."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from foreign_networks import rand
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.noise_levels.vp_schedules import VPLinearSchedule
from analytic_precond.teachers.guidance import guide
from analytic_precond.teachers.networks import denoiser_from_edm, denoiser_from_network


class Shifted(nn.Module):
    """An EDM-style network whose labels shift the result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + (class_labels @ self.weight).reshape(-1, 1, 1, 1)


class TestGuidance:
    x, t = rand(2, 3), torch.ones(2, dtype=torch.float64)

    @pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 7.5])
    def test_both_formulas(self, w: float) -> None:
        c, u = (lambda x, t: x**2), (lambda x, t: x.sin())
        torch.testing.assert_close(guide(c, u, w)(self.x, self.t), self.x.sin() + w * (self.x**2 - self.x.sin()))
        torch.testing.assert_close(
            guide(c, u, w, formula="from_conditional")(self.x, self.t), self.x**2 + w * (self.x**2 - self.x.sin())
        )

    def test_same_as_guiding_epsilon(self) -> None:
        c, u, schedule = (lambda x, time: x.cos()), (lambda x, time: x.sin()), VPLinearSchedule()
        guided = guide(*(denoiser_from_network(f, "epsilon", schedule) for f in (c, u)), 3.0)
        network = lambda x, time: u(x, time) + 3 * (c(x, time) - u(x, time))  # noqa: E731
        expected = denoiser_from_network(network, "epsilon", schedule)(self.x, self.t)
        torch.testing.assert_close(guided(self.x, self.t), expected)

    def test_conditions_go_to_the_conditional_one(self) -> None:
        network = Shifted()
        null = denoiser_from_edm(network, class_labels=torch.zeros(1, 5))
        guided = guide(denoiser_from_edm(network), null, 2.0)
        x, labels = rand(2, 3, 4, 4).float(), torch.eye(5)[[1, 4]]
        expected = 2 * network(x, torch.ones(2), labels) - network(x, torch.ones(2), torch.zeros(1, 5))
        torch.testing.assert_close(guided(x, torch.ones(2), class_labels=labels), expected)
        assert [p for p in guided.parameters()] == [network.weight]

    def test_shared_conditions_go_to_both(self) -> None:
        good, bad = Shifted(), Shifted()
        bad.weight.data.mul_(0.5)
        x, t, labels = rand(2, 3, 4, 4).float(), torch.ones(2), torch.eye(5)[[1, 4]]
        auto = guide(denoiser_from_edm(good), denoiser_from_edm(bad), 2.0, shared=("class_labels",))
        expected = 2 * good(x, t, labels) - bad(x, t, labels)
        torch.testing.assert_close(auto(x, t, class_labels=labels), expected)

        def conditional(x: Tensor, t: Tensor, class_labels: Tensor, only: float) -> Tensor:
            return only * good(x, t, class_labels)

        auto = guide(conditional, lambda x, t, class_labels: bad(x, t, class_labels), 2.0, shared=["class_labels"])
        expected = 6 * good(x, t, labels) - bad(x, t, labels)
        torch.testing.assert_close(auto(x, t, class_labels=labels, only=3.0), expected)

    @pytest.mark.parametrize("formula", ["from_unconditional", "from_conditional"])
    def test_one_scale_for_each_sample(self, formula: str) -> None:
        c, u, w = (lambda x, t: x**2), (lambda x, t: x.sin()), torch.tensor([0.5, 7.5])
        expected = torch.stack(
            [guide(c, u, float(w[i]), formula)(self.x[i : i + 1], self.t[i : i + 1])[0] for i in range(2)]
        )
        torch.testing.assert_close(guide(c, u, w, formula)(self.x, self.t), expected)
        torch.testing.assert_close(guide(c, u, None, formula)(self.x, self.t, guidance_scale=w), expected)
        by_level = guide(c, u, lambda t: torch.where(t == t[0], w[0], w[1]), formula)
        torch.testing.assert_close(by_level(self.x, torch.tensor([1.0, 2.0])), expected)

    def test_interval(self) -> None:
        """Limited-interval guidance (Kynkäänniemi et al. 2024): conditional outside."""
        c, u = (lambda x, t: x**2), (lambda x, t: x.sin())
        guided = guide(c, u, lambda t: torch.where((t > 0.3) & (t < 5.0), 3.0, 1.0))
        x = rand(3, 4)
        expected = torch.stack([x[0] ** 2, x[1].sin() + 3 * (x[1] ** 2 - x[1].sin()), x[2] ** 2])
        torch.testing.assert_close(guided(x, torch.tensor([0.2, 1.0, 7.0])), expected)

    def test_scale_of_a_call_follows_the_samples_and_reaches_the_student(self) -> None:
        """As latent consistency models are distilled: a scale drawn for each sample, told to teacher and student."""
        c, u = (lambda x, t: 0.3 * x), (lambda x, t: 0.1 * x)
        teacher, w = guide(c, u, None, formula="from_conditional"), torch.tensor([0.0, 2.0, 5.0])
        levels = torch.tensor([4.0, 2.0, 1.0, 0.5])
        start, stop = torch.tensor([0, 1, 0]), torch.tensor([3, 2, 2])
        x = rand(3, 4).float()
        together = ap.heun_solve(teacher, x, levels, start, stop, guidance_scale=w)  # drops samples on its way
        for i in range(3):
            fixed = guide(c, u, float(w[i]), formula="from_conditional")
            alone = ap.heun_solve(fixed, x[i : i + 1], levels, int(start[i]), int(stop[i]))
            torch.testing.assert_close(together[i : i + 1], alone)
        told = []

        def student(x: Tensor, t: Tensor, s: Tensor, guidance_scale: Tensor) -> Tensor:
            told.append(guidance_scale)
            return x * guidance_scale[:, None]

        times = ap.sample_jump_times(3, levels, end="smallest")
        loss = ap.consistency_distillation_loss(
            teacher, student, student, x, rand(3, 4).float(), times, guidance_scale=w
        )
        assert loss.loss.isfinite().all()
        assert all(torch.equal(scale, w) for scale in told)
        assert told

    def test_statistics_at_a_scale(self) -> None:
        data, levels = rand(256, 2).float(), torch.tensor([2.0, 1.0, 0.5])
        scaled = torch.utils.data.TensorDataset(data, torch.full((256,), 3.0))
        c, u = ap.GaussianDenoiser(1.0), ap.GaussianDenoiser(2.0)
        options: dict[str, Any] = {"levels": levels, "num_samples": 256, "s_method": "jvp", "progress": False}
        said = ap.estimate_statistics(guide(c, u, None), scaled, condition=lambda w: {"guidance_scale": w}, **options)
        built = ap.estimate_statistics(guide(c, u, 3.0), data, **options)
        torch.testing.assert_close(said.l, built.l)

    def test_bad_scales(self) -> None:
        c = ap.GaussianDenoiser(1.0)
        with pytest.raises(TypeError, match=r"guidance_scale must be given at each call.*: pass a number"):
            guide(c, c, None)(self.x, self.t)
        assert guide(c, c, None)(self.x, self.t, guidance_scale=2.0).shape == self.x.shape
        with pytest.raises(
            TypeError, match=r"the scale that the function returns must be a number or a tensor, got 'a'"
        ):
            guide(c, c, lambda t: "a")(self.x, self.t)  # type: ignore[arg-type, return-value]
        with pytest.raises(ValueError, match=r"one number per sample, shape \(2,\)"):
            guide(c, c, torch.ones(3))(self.x, self.t)
        with pytest.raises(TypeError, match=r"shared must be a tuple of names, got 'label': write shared="):
            guide(c, c, 2.0, shared="label")
        with pytest.raises(TypeError, match="unexpected keyword argument 'guidance_scale'"):
            guide(c, c, 2.0)(self.x, self.t, guidance_scale=2.0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_scales_that_are_not_finite_are_refused(self, bad: float) -> None:
        c = ap.GaussianDenoiser(1.0)
        for scale in (bad, torch.tensor([1.0, bad])):
            with pytest.raises(ValueError, match=r"^scale must be finite, got .*: pass finite numbers, e\.g\. 3\.0\."):
                guide(c, c, scale)
            with pytest.raises(ValueError, match=r"^the scale that the function returns must be finite, got "):
                guide(c, c, lambda t, scale=scale: scale)(self.x, self.t)
            with pytest.raises(ValueError, match=r"^guidance_scale must be finite, got "):
                guide(c, c, None)(self.x, self.t, guidance_scale=scale)
        assert guide(c, c, 3.0)(self.x, self.t).isfinite().all()
        guide(c, c, torch.full((2,), bad, device="meta"))  # a device whose values nobody waits for

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"'from_unconditional', 'from_conditional', got 'cfg'"):
            guide(ap.GaussianDenoiser(1.0), ap.GaussianDenoiser(1.0), 1.0, formula="cfg")
        with pytest.raises(TypeError, match="scale must be a number"):
            guide(ap.GaussianDenoiser(1.0), ap.GaussianDenoiser(1.0), "2")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="unconditional must be callable"):
            guide(ap.GaussianDenoiser(1.0), None, 2.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="unconditional denoiser must return"):
            guide(lambda x, t: x, lambda x, t: x[:1], 2.0)(self.x, self.t)


def test_statistics_leave_the_teacher_as_it_was() -> None:
    """With the null label of the unconditional half, which torch.func's transforms must not wrap for good."""
    network = Shifted()
    null = denoiser_from_edm(network, class_labels=torch.zeros(1, 5))
    guided = guide(denoiser_from_edm(network), null, 2.0)
    data, labels = rand(8, 1, 2, 2).float(), torch.eye(5)[torch.arange(8) % 5]
    ap.estimate_statistics(
        guided,
        torch.utils.data.TensorDataset(data, labels),
        ap.log_noise_levels(4),
        8,
        s_method="jvp",
        condition=lambda label: {"class_labels": label},
        progress=False,
    )
    t = torch.ones(8)
    assert torch.equal(copy.deepcopy(guided)(data, t, class_labels=labels), guided(data, t, class_labels=labels))
    assert type(null.condition["class_labels"]) is Tensor
    pickle.dumps(guided)


def test_the_default_s_method_is_warned_of() -> None:
    guided = guide(lambda x, t: x / 2, lambda x, t: x / 3, 2.0)
    options: dict[str, Any] = {"levels": ap.log_noise_levels(4), "num_samples": 8, "progress": False}
    with pytest.warns(UserWarning, match=r"the teacher is guided.*s_method='jvp' or 'finite-difference'"):
        ap.estimate_statistics(guided, rand(8, 2), **options)
    for s_method in ("jvp", "finite-difference"):  # the advice
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ap.estimate_statistics(guided, rand(8, 2), s_method=s_method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no guidance, no warning
        ap.estimate_statistics(guide(lambda x, t: x / 2, lambda x, t: x / 3, 1.0), rand(8, 2), **options)


def test_what_would_be_silently_wrong_is_refused() -> None:
    exact, x, t = ap.GaussianDenoiser(0.25), torch.ones(4, 2), torch.ones(4)
    with pytest.raises(TypeError, match=r"shared by both .* got no class_label: .* here class_labels"):
        guide(lambda x, t, **c: x, exact, 2.0, shared=("class_label",))(x, t, class_labels=x)
    with pytest.raises(ValueError, match=r"guidance scale must hold one number per sample, shape \(4,\), got \(3,\)"):
        guide(exact, exact, torch.ones(3))(x, t)
    with pytest.raises(ValueError, match=r"got \(3,\): or be one number for all"):
        guide(exact, exact, None)(x, t, guidance_scale=torch.ones(3))
    with pytest.raises(TypeError, match="shared must be a tuple of names, got None"):
        guide(exact, exact, 2.0, shared=None)  # type: ignore[arg-type]
    c, u = (lambda x, t: x), (lambda x, t: 0 * x)
    scales = [0.0, 1.0, 2.0, 3.0]
    assert guide(c, u, None)(x, t, guidance_scale=scales)[:, 0].tolist() == scales
