"""The pages of docs/integrate: every block runs, against stand-ins with each codebase's call signatures.

A stand-in repeats a codebase's interface and the lines that a page's diff names; where outputs of the reference code
exist, it must reproduce them before and after the change.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from edm_stand_in import EDMPrecond, PositionalEmbedding, SongUNet
from page_runner import PAGES, Namespace, append_dims, blocks, quiet_corner, run_page  # noqa: F401 - for all tests
from torch import Tensor, nn

import analytic_precond as ap

pytestmark = pytest.mark.long  # every code block of the pages is run, beside stand-ins for what it imports

GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_FILE).items()}
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]
th = torch  # its name in OpenAI's and Sony's code


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for a page to run."""
    monkeypatch.setattr(ap, "estimate_statistics", functools.partial(ap.estimate_statistics, num_samples=256))


def assert_last_block_objects(page: str, run: Callable[[], object]) -> None:
    """A mistake is found by the check at the page's end, not before."""
    with pytest.raises(AssertionError) as raised:
        run()
    assert traceback.extract_tb(raised.tb)[-1].filename == f"{page}, block {len(blocks(page)) - 1}"


def golden_network(x: Tensor, tau: Tensor, tau_s: Tensor | None = None) -> Tensor:
    """The closed form behind the reference outputs, told 250 ln(t + 1e-44)."""
    out = torch.sin(1.3 * x + 0.002 * append_dims(tau, x.ndim)) + 0.25 * x
    return out if tau_s is None else out + 0.1 * torch.cos(0.003 * append_dims(tau_s, x.ndim) + x)


def assert_same(got: Tensor, key: str, dtype: torch.dtype = torch.float64) -> None:
    """Equal to a reference output: float64 on both sides, or float32 on ours, with inputs up to 210."""
    rtol, atol = (1e-11, 1e-11) if dtype == torch.float64 else (1e-4, 1e-4)
    torch.testing.assert_close(got.double(), GOLDEN[key], rtol=rtol, atol=atol)


def images(size: int = 4, num: int = 512) -> Tensor:
    return (0.5 * torch.randn(num, 3, size, size)).clamp(-1, 1)


# openai/consistency_models


class OpenAINetwork(nn.Module):
    """As UNetModel: model(x, timesteps, y=None)."""

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return golden_network(x, timesteps)


class KarrasDenoiser:
    """As cm/karras_diffusion.py."""

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, distillation: bool = False) -> None:
        self.sigma_data, self.sigma_min, self.distillation = sigma_data, sigma_min, distillation

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, ...]:
        root = (sigma**2 + self.sigma_data**2) ** 0.5
        return self.sigma_data**2 / root**2, sigma * self.sigma_data / root, 1 / root

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> tuple[Tensor, ...]:
        root, shifted = (sigma**2 + self.sigma_data**2) ** 0.5, sigma - self.sigma_min
        return self.sigma_data**2 / (shifted**2 + self.sigma_data**2), shifted * self.sigma_data / root, 1 / root

    # fmt: off
    def denoise(self, model: Any, x_t: Tensor, sigmas: Tensor, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.distillation:
            scalings = [append_dims(x, x_t.ndim) for x in self.get_scalings(sigmas)]
        else:
            scalings = [
                append_dims(x, x_t.ndim)
                for x in self.get_scalings_for_boundary_condition(sigmas)
            ]
        c_skip, c_out, c_in = scalings
        rescaled_t = 1000 * 0.25 * th.log(sigmas + 1e-44)
        model_output = model(c_in * x_t, rescaled_t, **model_kwargs)
        return model_output, c_out * model_output + c_skip * x_t
    # fmt: on


def run_openai_cm(forgotten: str | None = None) -> tuple[KarrasDenoiser, KarrasDenoiser, Namespace]:
    teacher_diffusion, diffusion = KarrasDenoiser(), KarrasDenoiser(distillation=True)
    model = OpenAINetwork()
    assert_same(teacher_diffusion.denoise(model, X, T)[1], "openai_edm_denoised")
    assert_same(diffusion.denoise(model, X, T)[1], "openai_cm_denoised")

    namespace: Namespace = {"images": images(), "device": "cpu"}
    namespace |= {"diffusion": diffusion, "teacher_diffusion": teacher_diffusion}
    namespace |= {"model": model, "teacher_model": model}
    run_page("openai-cm.md", namespace, KarrasDenoiser, forgotten=forgotten)
    return diffusion, teacher_diffusion, namespace


def test_openai_cm() -> None:
    diffusion, teacher_diffusion, namespace = run_openai_cm()
    model, diffusion.precond = namespace["model"], namespace["analytic"]  # type: ignore[attr-defined]
    assert isinstance(namespace["analytic"], ap.AnalyticPreconditioning)
    difference = diffusion.denoise(model, X, T)[1] - GOLDEN["openai_cm_denoised"]
    assert difference.abs().max() > 1e-4
    diffusion.precond = ap.CMPreconditioning()  # type: ignore[attr-defined]
    assert_same(diffusion.denoise(model, X, T)[1], "openai_cm_denoised")
    assert_same(teacher_diffusion.denoise(model, X, T)[1], "openai_edm_denoised")


def test_openai_cm_asks_at_another_level() -> None:
    diffusion, teacher_diffusion, namespace = run_openai_cm()
    model, shifted = namespace["model"], diffusion.precond  # type: ignore[attr-defined]
    assert isinstance(shifted, ap.ShiftedPreconditioning)
    jump = diffusion.denoise(model, X, T)[1]
    student = ap.ConsistencyModel(model, shifted, noise_conditioning=ap.NOISE_CONDITIONINGS["cm"])
    torch.testing.assert_close(jump, student(X, T), rtol=1e-11, atol=1e-11)
    # method.md, section 12, with OpenAI's own denoiser: c_skip x_t + c_out D(kappa x_t, q)
    q = shifted.network_level(T, 0.002)
    assert (q < 0.9 * T).any()
    kappa = ((q**2 + 0.25) / (T**2 + 0.25)).sqrt()
    denoised = teacher_diffusion.denoise(model, append_dims(kappa, X.ndim) * X, q)[1]
    c_skip, c_out = (append_dims(c, X.ndim) for c in shifted(T, 0.002))
    torch.testing.assert_close(jump, c_skip * X + c_out * denoised, rtol=1e-11, atol=1e-11)
    assert_last_block_objects("openai-cm.md", lambda: run_openai_cm(forgotten="network_level"))


# NVlabs/edm


class GoldenEDMNetwork(nn.Module):
    """The closed form, called as an EDM network."""

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return golden_network(x, 1000 * noise_labels)


def edm_training_loop(ddp, ema, teacher, loss_fn, augment_pipe, images, labels, loss_scaling, batch_gpu_total):  # type: ignore[no-untyped-def]
    """As training/training_loop.py: the lines of the loss."""
    loss = loss_fn(net=ddp, images=images, labels=labels, augment_pipe=augment_pipe)
    loss.sum().mul(loss_scaling / batch_gpu_total).backward()
    return loss


@pytest.mark.parametrize("label_dim", [0, 5])
def test_edm(label_dim: int) -> None:
    assert_same(EDMPrecond(GoldenEDMNetwork())(X, T), "openai_edm_denoised", torch.float32)
    pixels = ((images() + 1) * 127.5).to(torch.uint8).numpy()
    classes = np.arange(len(pixels)) % max(label_dim, 1)
    one_hot = (classes[:, None] == np.arange(label_dim)).astype(np.float32)  # (N, 0) without classes, as the data set's
    net = EDMPrecond(SongUNet(label_dim=label_dim), label_dim=label_dim).eval().requires_grad_(False)
    namespace: Namespace = {"net": net, "dataset": list(zip(pixels, one_hot, strict=True))}
    run_page("edm.md", namespace, edm_training_loop)

    student, ema, labels = namespace["student"], namespace["ema"], namespace["labels"][:4]
    assert labels.shape == (4, label_dim)
    batch = namespace["images"][:4]
    loss = namespace["edm_training_loop"](student, ema, namespace["teacher"], None, None, batch, labels, 1.0, 4)
    assert loss.shape == (4,)
    condition = {"class_labels": labels if label_dim else None}
    assert ap.sample_deterministic(ema, 80.0 * batch, ap.karras_noise_levels(3), **condition).shape == batch.shape
    gradients = {name: p.grad for name, p in student.named_parameters()}
    assert gradients["network.network.map_augment.3.weight"].abs().max() > 0  # the target time is learned
    assert gradients["network.network.enter.weight"].abs().max() > 0
    golden = ap.ConsistencyTrajectoryModel(
        lambda x, c_t, c_s: golden_network(x, 1000 * c_t, 1000 * c_s), ap.CTMPreconditioning()
    )
    assert_same(golden(X, T, S), "sony_edm_euler_jump")  # ln(t) / 4 is the student's default


# sony/ctm


class CTMKarrasDenoiser:
    """As code/cm/karras_diffusion.py, with the default inner edm and outer euler."""

    teacher_model: Any = None

    def rescaling_t(self, t: Tensor) -> Tensor:
        return 1000 * 0.25 * th.log(t + 1e-44)

    def get_edm_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5

    def get_denoised(self, g_theta: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return g_theta

    def get_denoised_and_G(
        self,
        model: Any,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        ctm: bool = False,
        teacher: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rescaled_t = self.rescaling_t(t)
        rescaled_s = None if s is None else self.rescaling_t(s)
        c_in = append_dims((t**2 + 0.25) ** -0.5, x_t.ndim)
        model_output = model(c_in * x_t, rescaled_t, s=rescaled_s, teacher=teacher, **model_kwargs)
        c_skip, c_out = (append_dims(c, x_t.ndim) for c in self.get_edm_scalings(t))
        if ctm:
            g_theta = c_out * model_output + c_skip * x_t
            denoised = self.get_denoised(g_theta, x_t, t)
            c_skip, c_out = append_dims(s / t, x_t.ndim), append_dims(1.0 - s / t, x_t.ndim)
            G_theta = c_out * g_theta + c_skip * x_t
        else:
            assert teacher
            G_theta = denoised = c_out * model_output + c_skip * x_t
        return denoised, G_theta


class CTMBlock(nn.Module):
    """As code/cm/networks.py, UNetBlock: the target time comes in through affine_s."""

    def __init__(self, two_times: bool) -> None:
        super().__init__()
        self.affine, self.conv = nn.Linear(16, 3), nn.Conv2d(3, 3, 3, padding=1)
        if two_times:
            self.affine_s = nn.Linear(16, 3)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None = None) -> Tensor:
        params = self.affine(emb) if emb_s is None else self.affine(emb) + self.affine_s(emb_s)
        return torch.tanh(self.conv(x) + params[:, :, None, None])


class CTMSongUNet(nn.Module):
    """As code/cm/networks.py: two blocks that are told t, and s in the student."""

    def __init__(self, two_times: bool) -> None:
        super().__init__()
        self.map_noise = PositionalEmbedding()
        self.enc = nn.ModuleDict({"a": CTMBlock(two_times), "b": CTMBlock(two_times)})

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, class_labels: None = None) -> Tensor:
        for block in self.enc.values():
            x = block(x, self.map_noise(t), None if s is None else self.map_noise(s))
        return x


class EDMPrecond_CTM(nn.Module):
    """As code/cm/networks.py: model(x, t, s=None, teacher=False), a pickled EDM network or a two-time one inside."""

    def __init__(self, model: nn.Module, teacher: bool) -> None:
        super().__init__()
        self.model, self.teacher = model, teacher

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, teacher: bool = False) -> Tensor:
        sigma = torch.exp(t / 250.0) - 1e-44
        if not self.teacher:
            return self.model(x, sigma.log() / 4, None if s is None else (torch.exp(s / 250.0) - 1e-44).log() / 4)
        level = append_dims(sigma, x.ndim)
        root = (level**2 + 0.25).sqrt()
        return (self.model(x * root, sigma) - 0.25 / root**2 * x * root) / (level * 0.5 / root)


def golden_ctm(x: Tensor, t: Tensor, s: Tensor | None = None, teacher: bool = False) -> Tensor:
    return golden_network(x, t, s)


def run_sony_ctm(forgotten: str | None = None) -> tuple[CTMKarrasDenoiser, Namespace]:
    diffusion = CTMKarrasDenoiser()
    denoised, jump = diffusion.get_denoised_and_G(golden_ctm, X, T, S, ctm=True)
    assert_same(denoised, "sony_edm_euler_denoised")
    assert_same(jump, "sony_edm_euler_jump")

    model = EDMPrecond_CTM(CTMSongUNet(two_times=True), teacher=False).eval()
    teacher = EDMPrecond_CTM(EDMPrecond(CTMSongUNet(two_times=False)), teacher=True).eval().requires_grad_(False)
    namespace: Namespace = {"images": images(), "device": "cpu"}
    namespace |= {"diffusion": diffusion, "model": model, "teacher_model": teacher}
    run_page("sony-ctm.md", namespace, CTMKarrasDenoiser, forgotten=forgotten)
    return diffusion, namespace


def test_sony_ctm() -> None:
    diffusion, namespace = run_sony_ctm()
    model, report = namespace["model"], namespace["report"]
    assert len(report.zeroed) == 4
    assert not report.kept
    assert not report.unused

    assert isinstance(namespace["analytic"], ap.AnalyticPreconditioning)
    sigmas = torch.tensor([0.001, 90.0])  # the denoising term's levels: no jump, no error
    for precond in (namespace["analytic"], namespace["shifted"]):
        diffusion.precond = precond  # type: ignore[attr-defined]
        denoised = diffusion.get_denoised_and_G(model, images(num=2), sigmas, sigmas, ctm=True)[0]
        assert denoised.isfinite().all()
        jump = diffusion.get_denoised_and_G(golden_ctm, X, T, S, ctm=True)[1]
        assert (jump - GOLDEN["sony_edm_euler_jump"]).abs().max() > 1e-3
    diffusion.precond = ap.CTMPreconditioning()  # type: ignore[attr-defined]
    assert_same(diffusion.get_denoised_and_G(golden_ctm, X, T, S, ctm=True)[1], "sony_edm_euler_jump")


def test_sony_ctm_asks_at_another_level() -> None:
    diffusion, _ = run_sony_ctm()
    shifted = diffusion.precond  # type: ignore[attr-defined]
    assert isinstance(shifted, ap.ShiftedPreconditioning)
    jump = diffusion.get_denoised_and_G(golden_ctm, X, T, S, ctm=True)[1]
    student = ap.ConsistencyTrajectoryModel(golden_ctm, shifted, noise_conditioning=ap.NOISE_CONDITIONINGS["cm"])
    torch.testing.assert_close(jump, student(X, T, S), rtol=1e-11, atol=1e-11)
    # method.md, section 12: the network's input is c_in(t) x_t, its first level q
    q = shifted.network_level(T, S)
    assert (q < 0.9 * T).any()
    c_in, kappa, edm_skip, edm_out, c_skip, c_out = (
        append_dims(c, X.ndim)
        for c in (
            (T**2 + 0.25).rsqrt(),
            ((q**2 + 0.25) / (T**2 + 0.25)).sqrt(),
            0.25 / (q**2 + 0.25),
            0.5 * q * (q**2 + 0.25).rsqrt(),
            *shifted(T, S),
        )
    )
    denoised = edm_skip * kappa * X + edm_out * golden_ctm(c_in * X, 250 * q.log(), 250 * S.log())
    torch.testing.assert_close(jump, c_skip * X + c_out * denoised, rtol=1e-11, atol=1e-11)
    assert_last_block_objects("sony-ctm.md", lambda: run_sony_ctm(forgotten="self.precond.query"))


# locuslab/ect


class ECMPrecond(nn.Module):
    """As training/networks.py: other coefficients in training than in sampling."""

    label_dim = 0

    def __init__(self, model: nn.Module, sigma_min: float = 0.003, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_min, self.sigma_data = model, sigma_min, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        # fmt: off
        if self.training:
            c_skip, c_out = self.sigma_data**2 * c_in**2, sigma * self.sigma_data * c_in
        else:
            c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
            c_out = (sigma - self.sigma_min) * self.sigma_data / (sigma ** 2 + self.sigma_data ** 2).sqrt()
        # fmt: on
        return c_skip * x + c_out * self.model(c_in * x, (sigma.log() / 4).flatten(), class_labels=class_labels)


class ECMLoss:
    """As training/loss.py, with levels far out."""

    def t_to_r(self, t: Tensor) -> Tensor:
        return (t * 0.5).clamp(min=0)

    def __call__(self, net: nn.Module, y: Tensor) -> Tensor:
        t = torch.logspace(-4, 3, len(y)).reshape(-1, 1, 1, 1)
        r = self.t_to_r(t)
        eps = torch.randn_like(y)
        loss = (net(y + eps * t, t) - net(y + eps * r, r).detach()) ** 2
        return loss.flatten(1).sum(1).sqrt() / (t - r).flatten()


def test_ect() -> None:
    golden = ECMPrecond(GoldenEDMNetwork(), sigma_min=0.002)
    assert_same(golden.train()(X, T), "openai_edm_denoised", torch.float32)
    assert_same(golden.eval()(X, T), "openai_cm_denoised", torch.float32)

    network, loss = SongUNet(), ECMLoss()
    namespace: Namespace = {"images": images(), "loss": loss, "golden": golden}
    namespace |= {"net": ECMPrecond(network).eval(), "teacher_net": EDMPrecond(network).eval()}
    run_page("ect.md", namespace, ECMPrecond, ECMLoss)
    losses = loss(namespace["net"], images(num=64))
    losses.mean().backward()
    assert losses.isfinite().all()
    assert all(p.grad.isfinite().all() for name, p in network.named_parameters() if "map_augment" not in name)
    golden.precond = ap.CMPreconditioning()
    assert_same(golden.train()(X, T), "openai_cm_denoised", torch.float32)


# crowsonkb/k-diffusion


class KDiffusionDenoiser(nn.Module):
    """As layers.Denoiser: denoiser(input, sigma, **kwargs), sigma_data = 1 unless told."""

    def __init__(self, inner_model: nn.Module, sigma_data: float = 1.0) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = inner_model, sigma_data

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        level = append_dims(sigma, input.ndim)
        total = level**2 + self.sigma_data**2
        output = self.inner_model(input / total**0.5, sigma, **kwargs)
        return output * level * self.sigma_data / total**0.5 + input * self.sigma_data**2 / total


class InnerModel(nn.Module):
    """As models.ImageDenoiserModelV1: takes raw sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.enter, self.exit = nn.Linear(1, 16), nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, input: Tensor, sigma: Tensor) -> Tensor:
        embedding = self.embed((sigma.log() / 4)[:, None])
        return self.exit(torch.tanh(self.enter(input) + embedding[:, :, None, None]))


def kdiffusion_training(inner_model, inner_model_ema, reals, noise, sigma, K, config, aug_cond, extra_args):  # type: ignore[no-untyped-def]
    """As train.py: the lines around the model."""
    model = K.config.make_denoiser_wrapper(config)(inner_model)
    model_ema = K.config.make_denoiser_wrapper(config)(inner_model_ema)
    model.inner_model.load_state_dict(model_ema.inner_model.state_dict())
    losses = model.loss(reals, noise, sigma, aug_cond=aug_cond, **extra_args)
    losses.mean().backward()
    return losses


class SharedInnerModel(InnerModel):
    """Both are the same network where a reader takes the student's for the teacher's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInnerModel:
        return self


def run_k_diffusion(network: type[InnerModel] = InnerModel) -> Namespace:
    made = SimpleNamespace(
        make_model=lambda config: network(),
        make_denoiser_wrapper=lambda config: functools.partial(KDiffusionDenoiser, sigma_data=config["sigma_data"]),
    )
    namespace: Namespace = {"K": SimpleNamespace(config=made), "config": {"sigma_data": 0.4}, "device": "cpu"}
    namespace |= {"weights": network().state_dict(), "reals": images(), "sigma_min": 0.01, "sigma_max": 80.0}
    run_page("k-diffusion.md", namespace, kdiffusion_training)
    return namespace


def test_k_diffusion() -> None:
    golden = KDiffusionDenoiser(lambda x, sigma: golden_network(x, 250 * sigma.log()), sigma_data=0.5)  # type: ignore[arg-type]
    assert_same(golden(X, T), "openai_edm_denoised")

    namespace = run_k_diffusion()
    teacher_network, weights = namespace["teacher_network"], namespace["weights"]
    reals = images(num=32)
    network = InnerModel()
    network.load_state_dict(weights)
    losses = namespace["kdiffusion_training"](
        network, teacher_network, reals, torch.randn_like(reals), None, None, None, None, {}
    )
    assert losses.shape == (32,)
    assert network.exit.weight.grad.abs().max() > 0
    # the page's own step of training, and this one
    assert all(p.grad is None for p in teacher_network.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in teacher_network.state_dict().items())


def test_k_diffusion_teacher_is_not_trained() -> None:
    assert_last_block_objects("k-diffusion.md", lambda: run_k_diffusion(SharedInnerModel))


# huggingface/diffusers


def diffusers_training(unet, teacher_timesteps, student_timesteps, args):  # type: ignore[no-untyped-def]
    """As train_cm_ct_unconditional.py: the lines around the scalings."""

    def get_input_preconditioning(sigmas, sigma_data=0.5):  # type: ignore[no-untyped-def]
        return 1.0 / (sigmas**2 + sigma_data**2)

    def scalings_for_boundary_conditions(timestep, sigma_data=0.5):  # type: ignore[no-untyped-def]
        return sigma_data**2 / (timestep**2 + sigma_data**2), timestep / (timestep**2 + sigma_data**2) ** 0.5

    c_in_student = get_input_preconditioning(student_timesteps)
    c_skip_teacher, c_out_teacher = scalings_for_boundary_conditions(teacher_timesteps)
    c_skip_student, c_out_student = scalings_for_boundary_conditions(student_timesteps)
    assert c_skip_teacher.shape == c_out_teacher.shape == teacher_timesteps.shape

    def student(x: Tensor) -> Tensor:
        c_in, c_skip, c_out = (append_dims(c, x.ndim) for c in (c_in_student, c_skip_student, c_out_student))
        return c_skip * x + c_out * unet(c_in * x, 250 * student_timesteps.log()).sample

    return student


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers
def test_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    # a real U-Net is slow on one core: fewer samples
    monkeypatch.setattr(ap, "estimate_statistics", functools.partial(ap.estimate_statistics, num_samples=64))
    size = {"sample_size": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    layers = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(**size, **layers).eval().requires_grad_(False)
    namespace: Namespace = {"append_dims": append_dims, "Tensor": Tensor, "images": images(num=32)}
    namespace |= {"teacher_unet": unet, "scheduler": diffusers.DDPMScheduler(), "unet": unet}
    run_page("diffusers.md", namespace, diffusers_training)

    # script and scheduler agree, with any preconditioning; with CM's, diffusers' own scheduler does too
    x, t = 80 * images(num=2), torch.full((2,), 80.0)
    cm = diffusers.CMStochasticIterativeScheduler(sigma_min=0.02, clip_denoised=False)
    model = namespace["model"]
    model.precond = ap.CMPreconditioning(sigma_min=0.02)
    own = ap.ConsistencyJumpScheduler.from_student(model, ap.karras_noise_levels(40, 0.02, 80.0))
    for precond, schedulers in ((namespace["precond"], [namespace["sampler"]]), (model.precond, [own, cm])):
        namespace["precond"] = precond
        student = namespace["diffusers_training"](unet, t, t, SimpleNamespace(sigma_min=0.02))
        for scheduler in schedulers:
            scheduler.set_timesteps(1)
            (timestep,) = scheduler.timesteps
            output = unet(scheduler.scale_model_input(x, timestep), timestep).sample
            # float32, x up to 80
            torch.testing.assert_close(
                student(x), scheduler.step(output, timestep, x).prev_sample, rtol=1e-4, atol=1e-4
            )


# NVlabs/edm2


def unit_norm(w: Tensor) -> Tensor:
    return w / (1e-4 * w[0].numel() ** 0.5 + w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)))


class MPFourier(nn.Module):
    """As training/networks_edm2.py: random features of a level, of unit variance."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return 2**0.5 * torch.cos(x[:, None] * self.freqs + self.phases)


class MPConv(nn.Module):
    """As training/networks_edm2.py: rows of unit norm, rewritten in training."""

    def __init__(self, in_channels: int, out_channels: int, kernel: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit_norm(self.weight) * self.weight[0].numel() ** 0.5)
        w = gain * unit_norm(self.weight)
        return x @ w.T if w.ndim == 2 else nn.functional.conv2d(x, w, padding=w.shape[-1] // 2)


def mp_silu(x: Tensor) -> Tensor:
    return nn.functional.silu(x) / 0.596


class UNet(nn.Module):
    """As training/networks_edm2.py: the embedding, and a block that it modulates."""

    # fmt: off
    def __init__(self, img_channels: int, label_dim: int, cnoise: int = 8, cemb: int = 16) -> None:
        super().__init__()
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, kernel=[])
        self.emb_label = MPConv(label_dim, cemb, kernel=[])
        self.enter, self.exit = MPConv(img_channels, 16, kernel=[3, 3]), MPConv(16, img_channels, kernel=[3, 3])
        self.emb_linear, self.emb_gain = MPConv(cemb, 16, kernel=[]), torch.nn.Parameter(0.3 * torch.ones([]))

    def forward(self, x, noise_labels, class_labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        emb = (emb + self.emb_label(class_labels * class_labels.shape[1] ** 0.5)) / 2**0.5
        emb = mp_silu(emb)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        return self.exit(mp_silu(self.enter(x) * c[:, :, None, None]))
    # fmt: on


class Precond(nn.Module):
    """As training/networks_edm2.py: EDM's denoiser, which hands keywords on, and remembers its arguments."""

    def __init__(self, img_channels: int, label_dim: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.init_kwargs = {"img_channels": img_channels, "label_dim": label_dim, "sigma_data": sigma_data}
        self.sigma_data, self.label_dim = sigma_data, label_dim
        self.unet = UNet(img_channels, label_dim)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **unet_kwargs: Any) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        labels = torch.zeros(1, self.label_dim) if class_labels is None else class_labels
        total = sigma**2 + self.sigma_data**2
        F = self.unet(x / total.sqrt(), sigma.flatten().log() / 4, labels, **unet_kwargs)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * F


class LatentEncoder:
    """As training/encoders.py: means and deviations in, a sample of unit scale out."""

    def encode_latents(self, x: Tensor) -> Tensor:
        mean, std = x.to(torch.float32).chunk(2, dim=1)
        return (mean + torch.randn_like(mean) * std) / 8


@pytest.mark.usefixtures("few_samples")
def test_edm2() -> None:
    one_hot = np.eye(5, dtype=np.float32)
    raw = [
        (torch.cat([4 * torch.randn(4, 4, 4), 0.1 * torch.ones(4, 4, 4)]).numpy(), one_hot[i % 5]) for i in range(64)
    ]
    net = Precond(img_channels=4, label_dim=5).eval().requires_grad_(False)
    namespace: Namespace = {
        "net": net,
        "dataset": raw,
        "encoder": LatentEncoder(),
        "MPConv": MPConv,
        "mp_silu": mp_silu,
    }
    namespace |= {"MPFourier": MPFourier, "Precond": Precond}
    # Precond finds the edited UNet where the page's code is
    globals_of = Precond.__init__.__globals__
    before = globals_of["UNet"]
    namespace["Precond"] = lambda **arguments: edited(**arguments)

    def edited(**arguments: Any) -> Precond:
        globals_of["UNet"] = namespace["UNet"]
        try:
            return Precond(**arguments)
        finally:
            globals_of["UNet"] = before

    run_page("edm2.md", namespace, UNet)
    unet = namespace["student"].network.network.unet
    assert [*unet.state_dict().keys() - net.unet.state_dict().keys()] != []
    norms = unet.emb_target.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 8**0.5), rtol=1e-3, atol=0)  # rewritten in training


# lucidrains/denoising-diffusion-pytorch


class SinusoidalPosEmb(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None] * torch.logspace(0, -4, 8)
        return torch.cat([angles.sin(), angles.cos()], -1)


class Unet(nn.Module):
    """As denoising_diffusion_pytorch.py: a time in steps, and nothing else."""

    # fmt: off
    def __init__(self, dim: int = 16, full_attn = None) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.time_mlp = nn.Sequential(SinusoidalPosEmb(), nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, 16))
        if not full_attn:
            full_attn = (False, True)
        self.init_conv, self.final_conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x, time, x_self_cond = None):
        x = self.init_conv(x)
        t = self.time_mlp(time)
        return self.final_conv(torch.tanh(x + t[:, :, None, None]))
    # fmt: on


class GaussianDiffusion(nn.Module):
    """As denoising_diffusion_pytorch.py: the cosine table, and clean data from three predictions."""

    def __init__(self, model: nn.Module, objective: str) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        steps = torch.linspace(0, 1, 1001, dtype=torch.float64)
        bars = ((steps + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
        betas = (1 - bars[1:] / bars[:-1]).clip(0, 0.999)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).to(torch.float32))

    def normalize(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def model_predictions(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        alpha = append_dims(self.alphas_cumprod[t].sqrt(), x.ndim)
        sigma = append_dims((1 - self.alphas_cumprod[t]).sqrt(), x.ndim)
        F = self.model(x, t)
        clean = {"pred_noise": (x - sigma * F) / alpha, "pred_x0": F, "pred_v": alpha * x - sigma * F}
        return SimpleNamespace(pred_x_start=clean[self.objective])


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_lucidrains(objective: str) -> None:
    diffusion = GaussianDiffusion(Unet(), objective).eval().requires_grad_(False)
    namespace: Namespace = {"diffusion": diffusion, "images": (images() + 1) / 2, "arguments": {"dim": 16}}
    namespace["SinusoidalPosEmb"] = SinusoidalPosEmb
    run_page("lucidrains.md", namespace, Unet)
    network = namespace["network"]
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert grads["target_mlp.3.weight"].abs().max() > 0


# LCM, PCM and TCD


def lcm_training(unet, latents, noise, noise_scheduler, start_timesteps, timesteps, args):  # type: ignore[no-untyped-def]
    """As train_lcm_distill_sd_wds.py: the lines around the scalings."""

    def scalings_for_boundary_conditions(timestep, sigma_data=0.5, timestep_scaling=10.0):  # type: ignore[no-untyped-def]
        return ap.LCMPreconditioning(sigma_data, timestep_scaling)(timestep)

    # fmt: off
    if True:
            if True:
                c_skip_start, c_out_start = scalings_for_boundary_conditions(
                    start_timesteps, timestep_scaling=args.timestep_scaling_factor
                )
                c_skip_start, c_out_start = [append_dims(x, latents.ndim) for x in [c_skip_start, c_out_start]]
                c_skip, c_out = scalings_for_boundary_conditions(
                    timesteps, timestep_scaling=args.timestep_scaling_factor
                )
                c_skip, c_out = [append_dims(x, latents.ndim) for x in [c_skip, c_out]]
    # fmt: on
    noisy = noise_scheduler.add_noise(latents, noise, start_timesteps)
    bars = append_dims(noise_scheduler.alphas_cumprod[start_timesteps], noisy.ndim)
    pred_x_0 = (noisy - (1 - bars).sqrt() * unet(noisy, start_timesteps)) / bars.sqrt()
    return noisy, pred_x_0, c_skip_start * noisy + c_out_start * pred_x_0, (c_skip, c_out)


class TextToImage(nn.Module):
    """A small network with the signature of UNet2DConditionModel."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.exit, self.text = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(6, 8)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        h = self.enter(sample) + append_dims(timestep, 4).sin()
        if encoder_hidden_states is not None:
            h = h + self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        out = self.exit(torch.tanh(h))
        return SimpleNamespace(sample=out) if return_dict else (out,)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers
@pytest.mark.usefixtures("few_samples")
def test_lcm() -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    noise_scheduler, unet = diffusers.DDPMScheduler(**betas), TextToImage().eval().requires_grad_(False)
    namespace: Namespace = {"noise_scheduler": noise_scheduler, "teacher_unet": unet, "unet": unet}
    namespace |= {"latents": torch.randn(32, 4, 4, 4), "prompt_embeds": torch.randn(4, 5, 6)}
    namespace |= {"uncond_prompt_embeds": torch.zeros(4, 5, 6), "args": SimpleNamespace(timestep_scaling_factor=10.0)}
    run_page("lcm.md", namespace, lcm_training)

    # with CTM's preconditioning the training's jump is DDIM's to step 0
    k, noise = torch.tensor([999, 499, 19]), torch.randn(3, 4, 4, 4)
    namespace["jump"] = ap.CTMPreconditioning().on_schedule(namespace["schedule"])
    eps = lambda noisy, steps: unet(noisy, steps).sample  # noqa: E731
    noisy, clean, pred, at_zero = namespace["lcm_training"](
        eps, namespace["latents"][:3], noise, noise_scheduler, k, torch.zeros(3, dtype=torch.long), namespace["args"]
    )
    bar = noise_scheduler.alphas_cumprod[0]
    torch.testing.assert_close(pred, bar.sqrt() * clean + (1 - bar).sqrt() * eps(noisy, k), rtol=1e-4, atol=1e-4)
    assert (at_zero[0] == 1).all()
    assert (at_zero[1] == 0).all()

    # students of the teacher's weights, of one time and of two, start as the conditional teacher, not as the guided one
    class TwoTimes(TextToImage):
        def __init__(self) -> None:
            super().__init__()
            self.target = nn.Linear(1, 4)

        def forward(self, sample: Tensor, timestep: Tensor, *, s: Tensor, **told: Any) -> Any:
            return super().forward(sample + self.target(s[:, None] / 1000)[:, :, None, None], timestep, **told)

    precond, levels = namespace["precond"], torch.tensor([9.0, 1.0, 0.5])
    x, told = noise * 9, {"encoder_hidden_states": namespace["prompt_embeds"][:1]}
    ap.initialize_from_teacher(network := TwoTimes(), unet, zero=["target"])
    two = ap.ConsistencyTrajectoryModel.from_denoiser(
        ap.denoiser_from_diffusers(network, noise_scheduler), precond, target_time="s"
    )
    for student, ends in ((namespace["student"], namespace["student"].sigma_min), (two, levels / 3)):
        ends = torch.as_tensor(ends).expand(3)
        started = student(x, levels, ends, **told)
        conditional = precond.jump(x, namespace["teacher_for"](told["encoder_hidden_states"])(x, levels), levels, ends)
        torch.testing.assert_close(started, conditional, rtol=1e-4, atol=1e-4)
        assert (started - precond.jump(x, namespace["teacher"](x, levels), levels, ends)).abs().max() > 0.01

    # TCD's scheduler makes CTM's jump
    tcd = diffusers.TCDScheduler(**betas)
    tcd.set_timesteps(4)
    for gamma in (0.0, 0.3):
        tcd._step_index = None
        start, following = (int(step) for step in tcd.timesteps[:2])
        end = int((1 - gamma) * following)
        step = tcd.step(eps(noisy, k[:1]), start, noisy, eta=gamma)
        bars = noise_scheduler.alphas_cumprod[start]
        clean = (noisy - (1 - bars).sqrt() * eps(noisy, k[:1])) / bars.sqrt()
        jumped = namespace["jump"].jump(noisy, clean, start, end)
        torch.testing.assert_close(step.pred_noised_sample, jumped, rtol=1e-4, atol=1e-4)


# the pages themselves


@pytest.mark.parametrize(
    ("page", "heading", "row", "lines"),
    [
        ("edm2.md", "The student", "NVlabs/edm2, two times", 6),
        ("lucidrains.md", "The student", "the same, one-time and two-time student", 2 + 7),
        ("lcm.md", "The change", "LCM script, jump", 4),
        ("lcm.md", "Sampling", "Stable Diffusion 1 and 3, sampling", 3),
        ("diffusers.md", "A UNet as a student", "diffusers, UNet of two times", 4),
        ("flow-codebases.md", "willisma/SiT", "SiT, teacher on a GVP or VP path", 2),
        ("flow-codebases.md", "SiT, (one|two) times?", "SiT, one-time and two-time student", 1 + 14),
        ("flow-codebases.md", "facebookresearch/flow_matching", "flow_matching, teacher", 2),
        ("flow-codebases.md", "NVlabs/FastGen", "FastGen, teacher of any network", 9),
        ("flow-codebases.md", "FastGen, two times", "FastGen, two-time student", 3),
        ("flow-codebases.md", "NVlabs/rcm", "rCM, teacher, and jump in its angle", 11),
    ],
)
def test_lines_of_the_table_are_those_of_the_pages(page: str, heading: str, row: str, lines: int) -> None:
    found = re.finditer(
        rf"^## {heading}\n(?P<text>.*?)(?=^## )", (PAGES / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    section = "\n".join(match["text"] for match in found)
    written = [
        line
        for language, text in re.findall(r"^```(python|diff)\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
        for line in text.splitlines()
        if line and (language == "python" or line[0] == "+") and "TeacherStatistics.load" not in line
    ]
    assert len(written) == lines
    cells = next(
        line for line in (PAGES / "README.md").read_text().splitlines() if line.startswith(f"| {row} |")
    ).split(" | ")
    assert sum(map(int, re.findall(r"\d+", cells[1]))) == lines


def test_every_page_is_run_and_links_to_things_that_exist() -> None:
    pages = {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    code = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    index = (PAGES / "README.md").read_text()
    for page in pages:
        assert f'run_page("{page}"' in code
        assert f"]({page})" in index
    for path in PAGES.glob("*.md"):
        links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", path.read_text())
        assert links
        for target, anchor in links:
            file = (path.parent / target).resolve()
            assert file.is_file(), (path.name, target)
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, (path.name, anchor)
