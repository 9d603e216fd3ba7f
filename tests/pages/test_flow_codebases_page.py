"""docs/integrate/flow-codebases.md: its blocks run against stand-ins with the codebases' signatures and formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from page_runner import Namespace, append_dims, quiet_corner, run_page  # noqa: F401 - the fixture is for all tests
from torch import Tensor, nn

import analytic_precond as ap

pytestmark = pytest.mark.long  # every code block of the page is run, beside stand-ins for what it imports

DATA_STD = 0.7


class TimestepEmbedder(nn.Module):
    """SiT's, with a layer of two features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        return self.mlp(torch.stack([t.cos(), t.sin()], -1))


class SiT(nn.Module):
    """A transformer's interface, around one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.t_embedder, self.y_embedder = TimestepEmbedder(4), nn.Embedding(11, 4)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        return self.mix(x) + c[:, :, None, None]


class VPScheduler:
    """flow_matching's, from its paper: data at time 1."""

    def __call__(self, t: Tensor) -> SimpleNamespace:
        T = 0.5 * (1 - t) ** 2 * 19.9 + (1 - t) * 0.1
        return SimpleNamespace(alpha_t=(-0.5 * T).exp(), sigma_t=(1 - (-T).exp()).sqrt())


def gaussian_velocity(alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor, x: Tensor) -> Tensor:
    """The marginal velocity of white data: both conditional means are linear in x'."""
    total = (alpha * DATA_STD) ** 2 + sigma**2
    return (d_alpha * alpha * DATA_STD**2 + d_sigma * sigma) / total * x


class FastGenNetwork(nn.Module):
    """A network of the interface, with its own schedule; two linear layers of the time stand for the rest."""

    TYPES = ("edm", "rf", "trig", "sd")

    def __init__(self, schedule_type: str = "rf", net_pred_type: str = "flow", r_timestep: bool = False) -> None:
        super().__init__()
        self.schedule_type, self.net_pred_type, self.r_timestep = schedule_type, net_pred_type, r_timestep
        alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        extra = {"_alphas_cumprod": alphas_cumprod} if schedule_type == "sd" else {}
        self.noise_scheduler = SimpleNamespace(
            max_t={"edm": 80.0, "trig": math.pi / 2}.get(schedule_type, 0.999), **extra
        )
        torch.manual_seed(0)
        self.embed, self.mix = nn.Linear(2 * (1 + r_timestep), 3), nn.Conv2d(3, 3, 1)

    def alpha_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.schedule_type == "edm":
            return torch.ones_like(t), t
        if self.schedule_type == "rf":
            return 1 - t, t
        if self.schedule_type == "trig":
            return t.cos(), t.sin()
        bar = self.noise_scheduler._alphas_cumprod[(1000 * t).long().clamp(0, 999)]
        return bar.sqrt(), (1 - bar).sqrt()

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Any = None, r: Tensor | None = None, fwd_pred_type: str | None = None
    ) -> Tensor:
        assert t.dtype == torch.float64
        assert bool((t <= self.noise_scheduler.max_t).all())
        assert (r is not None) == self.r_timestep
        times = [time.float() for time in ((t,) if r is None else (t, r))]
        embedding = torch.cat([torch.stack([time.sin(), time.cos()], -1) for time in times], -1)
        return self.mix(x_t) + append_dims(self.embed(embedding).sum(-1), x_t.ndim)

    def clean(self, x_t: Tensor, t: Tensor, **more: Any) -> Tensor:
        """As its schedules convert ``net_pred_type`` to x0."""
        out, (alpha, sigma) = self(x_t, t, **more).double(), self.alpha_and_sigma(t)
        alpha, sigma, x = append_dims(alpha, x_t.ndim), append_dims(sigma, x_t.ndim), x_t.double()
        if self.net_pred_type == "x0":
            return out
        if self.net_pred_type == "eps":
            return (x - sigma * out) / alpha
        if self.net_pred_type == "v":
            return alpha * x - sigma * out
        return {"edm": x - sigma * out, "rf": x - sigma * out, "trig": alpha * x - sigma * out}[self.schedule_type]


class WanModel(nn.Module):
    """Called with a column of times, as rCM does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(4, 4, 1)

    def forward(self, x_B_C_T_H_W: Tensor, timesteps_B_T: Tensor, crossattn_emb: Tensor) -> Tensor:
        assert timesteps_B_T.shape == (len(x_B_C_T_H_W), 1)
        return self.mix(x_B_C_T_H_W) * append_dims((timesteps_B_T[:, 0] / 1000).cos() + crossattn_emb[:, 0], 5)


@pytest.fixture
def page() -> Namespace:
    latents = DATA_STD * torch.randn(128, 4, 4, 4)
    labels = torch.arange(128) % 10
    namespace: Namespace = {
        "SiT": SiT,
        "sit": SiT().eval().requires_grad_(False),
        "sit_config": {},
        "latents": latents,
        "labels": labels,
        "labelled_latents": torch.utils.data.TensorDataset(latents, labels),
        "scheduler": VPScheduler(),
        "fastgen_net": FastGenNetwork().eval(),
        "build_network": FastGenNetwork,
        "net_teacher": WanModel().eval(),
        "times_of_s": torch.full((128,), 0.9),
    }
    namespace["velocity_model"] = lambda x, t: 0 * x + append_dims(t, x.ndim)
    run_page("flow-codebases.md", namespace)
    return namespace


def test_sit_students_start_as_the_teacher(page: Namespace) -> None:
    latents, labels, precond = page["latents"], page["labels"], page["precond"]
    x, t, s = latents + 2 * torch.randn_like(latents), torch.full((128,), 2.0), torch.full((128,), 0.3)
    expected = precond.jump(x, page["teacher"](x, t, y=labels), t, s)
    torch.testing.assert_close(page["two_times"](x, t, s, y=labels), expected)
    one_time = page["student"](x, t, y=labels)
    torch.testing.assert_close(one_time, precond.jump(x, page["teacher"](x, t, y=labels), t, page["student"].sigma_min))
    trained = [*page["two_times"].parameters()]
    assert sum(p.numel() for p in trained) > sum(p.numel() for p in page["sit"].parameters())


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        ("Linear", ap.RectifiedFlowSchedule(data_at=1)),
        ("GVP", ap.VPCosineSchedule(offset=0.0, data_at=1)),
        ("VP", ap.VPLinearSchedule(data_at=1)),
    ],
)
def test_sit_paths(path: str, schedule: ap.Schedule) -> None:
    """Their velocities of white data, from the definitions of the three paths, give back the posterior mean."""

    def coefficients(t: Tensor) -> tuple[Tensor, ...]:
        if path == "Linear":
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
        if path == "GVP":
            angle = t * math.pi / 2
            return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()
        log_alpha = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
        rate = 0.5 * (1 - t) * 19.9 + 0.5 * 0.1
        sigma = (1 - (2 * log_alpha).exp()).sqrt()
        return log_alpha.exp(), sigma, log_alpha.exp() * rate, -(2 * log_alpha).exp() * rate / sigma

    def network(x: Tensor, t: Tensor) -> Tensor:
        return gaussian_velocity(*(append_dims(value, x.ndim) for value in coefficients(t)), x)

    x, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([40.0, 3.0, 0.5, 0.02], dtype=torch.float64)
    expected = append_dims(DATA_STD**2 / (DATA_STD**2 + t**2), 2) * x
    # 1e-9: the square root of 1 - exp near the data
    torch.testing.assert_close(
        ap.denoiser_from_network(network, "velocity", schedule)(x, t), expected, rtol=1e-9, atol=1e-9
    )


def test_flow_matching_schedule(page: Namespace) -> None:
    t = torch.logspace(-2, 1.9, 50, dtype=torch.float64)
    torch.testing.assert_close(page["path"].time(t), ap.VPLinearSchedule(data_at=1).time(t), rtol=1e-9, atol=0)
    assert page["flow_teacher"](torch.zeros(2, 3), torch.ones(2)).isfinite().all()


@pytest.mark.parametrize(
    ("schedule_type", "net_pred_type"),
    [
        *((schedule_type, predicted) for schedule_type in FastGenNetwork.TYPES for predicted in ("x0", "eps")),
        *((schedule_type, "flow") for schedule_type in ("edm", "rf", "trig")),
        ("sd", "v"),
    ],
)
def test_fastgen_denoiser(page: Namespace, schedule_type: str, net_pred_type: str) -> None:
    net = FastGenNetwork(schedule_type, net_pred_type)
    t = torch.tensor([0.05, 0.7, 20.0, 80.0], dtype=torch.float64)
    times = {
        "edm": t,
        "rf": t / (1 + t),
        "trig": t.atan(),
        "sd": torch.tensor([29, 300, 958, 999], dtype=torch.float64) / 1000,
    }[schedule_type]
    alpha, sigma = net.alpha_and_sigma(times)
    x = torch.randn(4, 3, 2, 2)
    x = x * append_dims((DATA_STD**2 + (sigma / alpha) ** 2).sqrt(), 4).float()
    expected = net.clean((append_dims(alpha, 4).float() * x), times)
    got = page["fastgen_denoiser"](net)(x, sigma / alpha)
    # the network's float32, times the level
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float((1 + sigma / alpha).max()))


def test_fastgen_student_starts_as_the_teacher(page: Namespace) -> None:
    x, t, s = 3.0 * torch.randn(4, 3, 2, 2), torch.full((4,), 3.0), torch.full((4,), 0.4)
    teacher = page["fastgen_denoiser"](page["fastgen_net"])
    expected = page["precond"].jump(x, teacher(x, t), t, s)
    torch.testing.assert_close(page["fastgen_student"](x, t, s), expected, rtol=1e-5, atol=1e-5)


def test_rcm(page: Namespace) -> None:
    """Its scalings of a rectified flow in TrigFlow's angle, and the jump to another angle by hand."""
    net, condition = page["net_teacher"], torch.randn(2, 1)
    t = torch.tensor([40.0, 0.5], dtype=torch.float64)
    time = t.atan()
    clean, z = DATA_STD * torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    xt = append_dims(time.cos(), 5) * clean + append_dims(time.sin(), 5) * z
    total = append_dims(time.cos() + time.sin(), 5)
    told = 1000 * (time.sin() / (time.cos() + time.sin())).float()[:, None]
    output = net((xt / total).float(), told, condition)
    x0 = xt / total - append_dims(time.sin(), 5) / total * output
    x = xt / append_dims(time.cos(), 5)
    got = page["rcm_teacher"](x.float(), t, crossattn_emb=condition)
    torch.testing.assert_close(got.double(), x0, rtol=1e-4, atol=1e-4)

    time_s = torch.tensor([1.0, 0.3], dtype=torch.float64)
    jumped = page["jump"](xt, x0, time, time_s)
    expected = append_dims(time_s.cos(), 5) * page["precond"].jump(x, x0, t, time_s.tan())
    torch.testing.assert_close(jumped, expected, rtol=1e-9, atol=1e-9)
