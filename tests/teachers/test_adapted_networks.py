"""Adapters as modules: dtypes, conditions, derivatives, compilation, EDM-style networks and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign_networks import PATHS, TABLE, rand
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.noise_levels.schedules import EDMSchedule, TrigFlowSchedule
from analytic_precond.noise_levels.vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule
from analytic_precond.teachers.networks import NetworkDenoiser, denoiser_from_edm, denoiser_from_network


class Linear(nn.Module):
    """A small network that remembers what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32, conditional: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=dtype)
        self.conditional = conditional

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        if condition and not self.conditional:
            raise TypeError(f"forward() got an unexpected keyword argument '{next(iter(condition))}'")
        self.seen = (x, time, condition)
        return self.linear(x)


class TestPrecision:
    x, t = rand(3, 4).float(), torch.tensor([80.0, 1.0, 0.01])

    def by_hand(self, network: Linear, dtype: torch.dtype) -> Tensor:
        z = (self.x / (1 + self.t[:, None].double() ** 2).sqrt().float()).to(dtype)
        return self.x - self.t[:, None] * network.linear(z).float()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_cast_at_the_networks_boundary_only(self, dtype: torch.dtype) -> None:
        network = Linear(dtype)
        denoised = denoiser_from_network(network, "epsilon", VPLinearSchedule(time_scale=999))(self.x, self.t)
        assert (network.seen[0].dtype, network.seen[1].dtype) == (dtype, torch.float32)
        assert denoised.dtype == torch.float32
        torch.testing.assert_close(denoised, self.by_hand(network, dtype))

    def test_dtype_argument(self) -> None:
        network = Linear(torch.float64)
        denoiser_from_network(network.bfloat16(), "v", EDMSchedule(), dtype=torch.bfloat16)(self.x.double(), self.t)
        assert network.seen[0].dtype == torch.bfloat16
        denoiser_from_network(network.double(), "v", EDMSchedule(), dtype=torch.float64)(self.x, self.t)
        assert (network.seen[0].dtype, network.seen[1].dtype) == (torch.float64, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_plain_callable_and_result_have_the_datas_dtype(self, dtype: torch.dtype) -> None:
        seen = []
        denoiser = denoiser_from_network(lambda x, time: seen.append(x.dtype) or x, "sample", EDMSchedule())
        assert denoiser(self.x.to(dtype), self.t).dtype == dtype
        assert seen == [dtype]

    def test_autocast_reaches_the_network_and_nothing_else(self) -> None:
        network = Linear()
        denoiser = denoiser_from_network(network, "epsilon", VPLinearSchedule())
        with torch.autocast("cpu", torch.bfloat16):
            denoised = denoiser(self.x, self.t)
            assert network.linear(self.x).dtype == torch.bfloat16
            expected = self.by_hand(network, torch.float32)
        torch.testing.assert_close(denoised, expected)
        assert denoised.dtype == torch.float32

    def test_quantized_times_stay_integers(self) -> None:
        network = Linear()
        denoiser_from_network(network, "epsilon", VPDiscreteSchedule(TABLE, quantize=True))(self.x, self.t)
        assert network.seen[1].dtype == torch.int64


class TestModule:
    x, t = rand(3, 4).float(), torch.tensor([80.0, 1.0, 0.01])

    def test_parameters_conditions_and_copies(self) -> None:
        network = Linear(conditional=True)
        denoiser = denoiser_from_network(network, "epsilon", EDMSchedule(), label=1, mask=2)
        assert [p for p in denoiser.parameters()] == [p for p in network.parameters()]
        expected = denoiser(self.x, self.t, label=3)
        assert network.seen[2] == {"label": 3, "mask": 2}
        torch.testing.assert_close(copy.deepcopy(denoiser)(self.x, self.t), expected)
        assert isinstance(denoiser, ap.Denoiser)

    def test_levels_in_any_accepted_shape(self) -> None:
        denoiser = denoiser_from_network(Linear(), "v", VPCosineSchedule())
        expected = denoiser(self.x, torch.full((3,), 2.0))
        for t in (torch.tensor(2.0), torch.tensor([2.0]), torch.full((3, 1), 2.0)):
            torch.testing.assert_close(denoiser(self.x, t), expected)
        with pytest.raises(ValueError, match="one noise level per sample"):
            denoiser(self.x, torch.ones(3, 4))

    def test_gradients_reach_input_and_parameters(self) -> None:
        network, x = Linear(torch.bfloat16), self.x.clone().requires_grad_()
        denoiser_from_network(network, "epsilon", EDMSchedule())(x, self.t).sum().backward()
        assert x.grad is not None
        expected = -(self.t.sum() * torch.ones(4)).bfloat16()
        torch.testing.assert_close(network.linear.bias.grad, expected)

    def test_compiles_in_one_graph(self) -> None:
        torch.compiler.reset()  # others' graphs of the same code count, and torch keeps eight
        for schedule in (VPDiscreteSchedule(TABLE), VPCosineSchedule(), TrigFlowSchedule()):
            denoiser = denoiser_from_network(lambda x, time: x.sin() + time[:, None], "velocity", schedule)
            compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(self.x, self.t), denoiser(self.x, self.t))

    def test_edm_preconditioning_wraps_a_raw_edm_network(self) -> None:
        network = Linear()
        t = self.t[:, None]
        denoised = NetworkDenoiser(network, ap.EDMPreconditioning(0.5))(self.x, self.t)
        total = t**2 + 0.25
        expected = 0.25 / total * self.x + 0.5 * t / total.sqrt() * network.linear(self.x / total.sqrt())
        torch.testing.assert_close(denoised, expected)
        torch.testing.assert_close(network.seen[1], self.t.log() / 4)

    def test_trigflow_velocity_is_its_raw_network(self) -> None:
        network, angle = Linear(), (self.t / 0.5).atan()[:, None]
        denoised = denoiser_from_network(network, "velocity", TrigFlowSchedule(sigma_data=0.5))(self.x, self.t)
        x_trig = angle.cos() * self.x
        torch.testing.assert_close(denoised, angle.cos() * x_trig - angle.sin() * 0.5 * network.linear(x_trig / 0.5))
        torch.testing.assert_close(network.seen[1], angle[:, 0])

    def test_learned_variance_is_dropped_on_request(self) -> None:
        network = lambda x, time: torch.cat([x, x + 100], 1)  # noqa: E731
        denoiser = denoiser_from_network(network, "sample", EDMSchedule(), learned_variance=True)
        torch.testing.assert_close(denoiser(self.x, self.t), self.x)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("name", PATHS)
    def test_gpu_agrees_and_never_synchronises(self, name: str) -> None:
        denoiser = denoiser_from_network(lambda x, time: x.sin(), "velocity", PATHS[name][0])
        x, t = self.x.cuda(), self.t.cuda()
        denoiser(x, t)
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = denoiser(x, t)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(result.cpu(), denoiser(self.x, self.t), rtol=1e-5, atol=1e-4)


class EDMNet(nn.Module):
    """What NVlabs-style networks do at their boundary: float32, sigma reshaped, labels optional."""

    def __init__(self, label_dim: int = 0) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.weight = nn.Parameter(torch.linspace(-1, 1, max(label_dim, 1)))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        labels = None if self.label_dim == 0 else torch.zeros(1, self.label_dim)
        labels = labels if class_labels is None or labels is None else class_labels.float()
        shift = 0.0 if labels is None else (labels @ self.weight.float()).reshape(-1, 1, 1, 1)
        return (x + shift) / (1 + sigma**2)


class TestEDM:
    x, t = rand(2, 3, 4, 4), torch.tensor([80.0, 0.5], dtype=torch.float64)

    def test_is_the_network_itself(self) -> None:
        labels = torch.eye(5)[[1, 4]]
        network = EDMNet(5)
        expected = network(self.x, self.t, labels).double()
        for denoised in (
            denoiser_from_edm(network)(self.x, self.t, class_labels=labels),
            denoiser_from_edm(network, class_labels=labels)(self.x, self.t),
        ):
            assert torch.equal(denoised, expected)

    def test_input_is_not_rounded_for_half_precision_weights(self) -> None:
        denoised = denoiser_from_edm(EDMNet().half())(self.x.float(), self.t.float())
        assert torch.equal(denoised, EDMNet()(self.x, self.t))

    def test_labels_for_an_unconditional_network(self) -> None:
        with pytest.raises(ValueError, match=r"unconditional \(label_dim = 0\)"):
            denoiser_from_edm(EDMNet())(self.x, self.t, class_labels=torch.eye(2))
        denoiser_from_edm(EDMNet())(self.x, self.t, class_labels=None)


class TestErrors:
    x, t = rand(3, 4).float(), torch.ones(3)

    def test_unknown_prediction_and_schedule(self) -> None:
        with pytest.raises(ValueError, match=r"prediction must be one of 'epsilon', .*'velocity', got 'eps'"):
            denoiser_from_network(Linear(), "eps", EDMSchedule())
        with pytest.raises(TypeError, match=r"schedule must be a Schedule, got 'cosine': build a VPLinearSchedule"):
            denoiser_from_network(Linear(), "epsilon", "cosine")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="network must be callable"):
            denoiser_from_network(3, "epsilon", EDMSchedule())  # type: ignore[arg-type]

    def test_wrong_output(self) -> None:
        with pytest.raises(ValueError, match=r"x's shape \(3, 4\), got \(3, 8\).*learned_variance"):
            denoiser_from_network(lambda x, time: torch.cat([x, x], 1), "sample", EDMSchedule())(self.x, self.t)
        with pytest.raises(TypeError, match="floating-point tensor, got tuple: unwrap"):
            denoiser_from_network(lambda x, time: (x,), "sample", EDMSchedule())(self.x, self.t)

    def test_conditions_that_the_network_does_not_take(self) -> None:
        denoiser = denoiser_from_network(Linear(), "epsilon", EDMSchedule())
        with pytest.raises(TypeError, match=r"network\(x, time, label=\.\.\.\).*none to an unconditional teacher"):
            denoiser(self.x, self.t, label=torch.ones(3))
        with pytest.raises(TypeError, match=r"refuses: .*'label'. Pass the conditions"):
            denoiser_from_network(lambda x, time, label: x, "epsilon", EDMSchedule())(self.x, self.t)

    def test_other_type_errors_come_as_they_are(self) -> None:
        with pytest.raises(TypeError, match=r"^unsupported operand"):
            denoiser_from_network(lambda x, time: x + "a", "epsilon", EDMSchedule())(self.x, self.t)

    def test_integer_data(self) -> None:
        with pytest.raises(TypeError, match="x must be a floating-point tensor"):
            denoiser_from_network(Linear(), "epsilon", EDMSchedule())(torch.ones(3, 4).long(), self.t)
