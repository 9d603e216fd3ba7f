"""The pages of docs/integrate: every block runs, against stand-ins with each codebase's call signatures.

A stand-in repeats a codebase's interface and the lines that a page's diff names; where outputs of the reference code
exist, it must reproduce them before and after the change.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkout import DOCS
from checkout import GOLDEN as GOLDEN_FILE
from edm_stand_in import EDMPrecond, PositionalEmbedding, SongUNet
from torch import Tensor, nn

import analytic_precond as ap

pytestmark = pytest.mark.long  # every code block of the pages is run, beside stand-ins for what it imports

PAGES = DOCS / "integrate"
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_FILE).items()}
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]
Namespace = dict[str, Any]
th = torch  # its name in OpenAI's and Sony's code


@pytest.fixture(autouse=True)
def _quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write files, draw random numbers and run networks too small for threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ap, "estimate_statistics", functools.partial(ap.estimate_statistics, progress=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def blocks(page: str) -> list[tuple[str, str]]:
    """Languages and texts of all blocks of a page, of which there are only python and diff."""
    text = (PAGES / page).read_text()
    found = re.findall(r"^```(python|diff)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert text.count("```") == 2 * len(found)
    return found


def run_page(
    page: str, namespace: Namespace, *stand_ins: type | Callable[..., Any], forgotten: str | None = None
) -> None:
    """Run a page's python blocks in order; apply its diffs to the stand-ins' source and to their instances.

    A reader may forget the diffs that contain a text.
    """
    sources = {stand_in.__name__: inspect.getsource(stand_in) for stand_in in stand_ins}
    namespace |= {"append_dims": append_dims, "torch": torch, "th": torch, "nn": nn, "Any": Any, "Tensor": Tensor}
    namespace |= {"__name__": page, **{stand_in.__name__: stand_in for stand_in in stand_ins}}
    python = diff = 0
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            python += 1
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)
            continue
        if forgotten is not None and forgotten in text:
            continue
        for hunk in re.split(r"^@@ .* @@ .*\n", text, flags=re.MULTILINE)[1:]:
            diff += 1
            patched = [name for name, source in sources.items() if patch(source, hunk) != source]
            assert len(patched) == 1, hunk
            sources[patched[0]] = patch(sources[patched[0]], hunk)
        for name, source in sources.items():
            old = namespace[name]
            exec(compile(source, f"{page}, {name}", "exec"), namespace)
            for value in list(namespace.values()):
                if isinstance(old, type) and type(value) is old:
                    value.__class__ = namespace[name]
    assert python >= 2
    assert forgotten is not None or diff == sum(
        text.count("@@ ") // 2 for language, text in blocks(page) if language == "diff"
    )


def patch(source: str, hunk: str) -> str:
    """Replace a hunk's old lines, found once, by its new ones; unchanged where they are not found."""
    lines, marked = source.splitlines(), hunk.splitlines()
    old = [line[1:].strip() for line in marked if line[0] in " -"]
    starts = [i for i in range(len(lines)) if [line.strip() for line in lines[i : i + len(old)]] == old]
    if not starts:
        return source
    (start,) = starts
    shift = indent(lines[start]) - indent(marked[0][1:])
    new = [" " * (indent(line[1:]) + shift) + line[1:].strip() for line in marked if line[0] in " +"]
    return "\n".join([*lines[:start], *new, *lines[start + len(old) :], ""])


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def append_dims(level: Tensor, ndim: int) -> Tensor:
    return level.reshape(-1, *[1] * (ndim - 1))


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


# the pages themselves


def test_every_page_is_run_and_links_to_things_that_exist() -> None:
    pages = {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    code = Path(__file__).read_text()
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
