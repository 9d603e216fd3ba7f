"""DPM-Solver-v3's statistics: its first-order step, written from the paper's formulas, lands where it should."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import DOCS
from problems import Array, gaussian_problem, mixture_problem
from torch import Tensor

import analytic_precond as ap
from analytic_precond.preconditionings.per_element import PerElementPreconditioning
from analytic_precond.statistics.ems import load_ems, save_ems

PROBLEM = gaussian_problem()
JUMPS = [*pairwise((0, 300, 700, 1000, 1200)), (0, 1200), (599, 600)]  # indices of the files' 1201 levels
# its trapezoidal rule: steps of 0.0088 in lambda, h^2 / 12 = 6.5e-6 times curvatures of 1 to 4
CLOSE = 5e-5


def first_order_step(folder: Path, x: Tensor, D: Tensor, i: int, j: int) -> Tensor:
    r"""The paper's solution (its propositions 3.1, 3.2) with a constant g, alpha = 1, sigma epsilon = x - D.

    $x_t = A (x_s - \int E_s B_s d\lambda - \hat g \int E_s d\lambda)$ with $A = e^{-\int_s^t l}$,
    $E_s = e^{\int_s (l + s)}$, $B_s = \int_s e^{-\int_s s} b$ and $\hat g = f_s = \sigma \epsilon - l x_s$.
    """
    l, (s, b) = np.load(folder / "l.npz")["l"], (np.load(folder / "sb.npz")[name] for name in "sb")
    assert l.dtype == s.dtype == b.dtype == np.float32
    width = np.log(80 / 0.002) / (len(l) - 1)

    def running(values: Array) -> Array:
        steps = width * (values[1:] + values[:-1]) / 2
        return np.concatenate([0 * steps[:1], steps.cumsum(0)])

    l_ij, s_ij, b_ij = (v[i : j + 1].astype(np.float64) for v in (l, s, b))
    E = np.exp(running(l_ij + s_ij))
    B = running(np.exp(-running(s_ij)) * b_ij)
    x_s = x.numpy()
    f = x_s - D.numpy() - l_ij[0] * x_s
    return torch.from_numpy(np.exp(-running(l_ij)[-1]) * (x_s - running(E * B)[-1] - f * running(E)[-1]))


def level(k: int) -> float:
    return 80.0 * (0.002 / 80.0) ** (k / 1200)


def image_denoiser(denoiser: ap.Denoiser) -> ap.Denoiser:
    return lambda x, t: denoiser(x.flatten(1), t).reshape(x.shape)


def gaussian_statistics(per_element: bool = False, mean: float = 0.0, **options: object) -> ap.TeacherStatistics:
    problem = gaussian_problem(mean=mean)
    data, denoiser = problem.sample(512, 0).reshape(-1, 1, 2, 3), image_denoiser(problem.denoiser)
    return ap.estimate_statistics(
        denoiser, data, num_samples=1024, progress=False, per_element=per_element, batch_size=4096, **options
    )


def test_on_a_mixture_it_is_the_forward_form(tmp_path: Path) -> None:
    mixture = mixture_problem()
    denoiser = image_denoiser(mixture.denoiser)
    data = mixture.sample(1024, 0).reshape(-1, 1, 1, 1)
    stats = ap.estimate_statistics(denoiser, data, num_samples=2048, progress=False, per_element=True, batch_size=4096)
    forward = ap.AnalyticPreconditioning(stats, "forward")
    by_element = PerElementPreconditioning(stats, "forward")
    save_ems(stats, tmp_path / "element")
    save_ems(stats, tmp_path / "sample", per="sample")
    for i, j in JUMPS:
        t, s = level(i), level(j)
        x = data[:16] + t * torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        D = denoiser(x, torch.full((16,), t).double())
        for folder, precond in (("element", by_element), ("sample", forward)):
            expected = precond.jump(x, D, t, s)
            got = first_order_step(tmp_path / folder, x, D, i, j)
            size = (precond(t, s).c_out * D).abs().max() + expected.abs().max()  # terms that may cancel
            assert (got - expected).abs().max() < CLOSE * size, (i, j, folder)


@pytest.mark.parametrize("per", ["element", "sample"])
def test_on_a_gaussian_it_is_the_forward_form(per: str, tmp_path: Path) -> None:
    stats = gaussian_statistics(per == "element")
    precond: ap.Preconditioning = (
        PerElementPreconditioning(stats, "forward")
        if per == "element"
        else ap.AnalyticPreconditioning(stats, "forward")
    )
    save_ems(stats, tmp_path, per=per)
    for i, j in JUMPS:
        x = PROBLEM.sample(16, 1).reshape(-1, 1, 2, 3) * (1 + level(i))
        D = 0.5 * x.roll(1, 0)  # any output
        expected = precond.jump(x, D, level(i), level(j))
        size = (precond(level(i), level(j)).c_out * D).abs().max() + expected.abs().max()
        assert (first_order_step(tmp_path, x, D, i, j) - expected).abs().max() < CLOSE * size


def test_with_an_intercept_a_gaussian_with_a_mean_is_solved_in_one_step(tmp_path: Path) -> None:
    mean = 0.25
    save_ems(gaussian_statistics(True, mean, intercept=True), tmp_path)
    denoiser = image_denoiser(gaussian_problem(mean=mean).denoiser)
    for i, j in JUMPS:
        t, s = level(i), level(j)
        deviation = PROBLEM.sample(16, 1) * (1 + t)
        x = (mean + deviation).reshape(-1, 1, 2, 3)
        got = first_order_step(tmp_path, x, denoiser(x, torch.full((16,), t).double()), i, j)
        expected = (mean + PROBLEM.flow(deviation, t, s)).reshape(x.shape)
        assert (got - expected).abs().max() < CLOSE * expected.abs().max()


def test_closed_form_of_an_anisotropic_gaussian(tmp_path: Path) -> None:
    # mean m: f = -g, E f = -m (1 - l), and b = dE f/dlambda - s E f = m (l' + s (1 - l))
    mean, levels = 0.5, np.array([level(k) for k in range(0, 1201)])
    save_ems(gaussian_statistics(mean=mean, intercept=True, s_method="jvp", seed=3), tmp_path, per="sample")
    ems = load_ems(tmp_path)
    np.testing.assert_allclose(ems.levels, levels, rtol=1e-12)
    l, s = PROBLEM.l(levels).numpy(), PROBLEM.s(levels).numpy()
    c = PROBLEM.variances.numpy()
    dl = (2 * levels[:, None] ** 2 * c / (c + levels[:, None] ** 2) ** 2).mean(-1)
    assert ems.l.shape == ems.s.shape == (1201, 1, 1, 1)
    assert ems.b.shape == (1201, 1, 2, 3)
    # 512 pairs of 6 elements: 2 % of l where elements differ; l is 1e-4 and float32 1 - l exact to 6e-8 at t = 80
    np.testing.assert_allclose(ems.l.flatten(), l, rtol=0.05)
    np.testing.assert_allclose(ems.s.flatten(), s, atol=0.1)
    b = mean * (dl + s * (1 - l))
    np.testing.assert_allclose(ems.b.flatten(1), np.repeat(b[:, None], 6, 1), atol=0.05)


def test_nothing_remains_of_white_data(tmp_path: Path) -> None:
    # g = 0: s and b are 0, and the file gives l back; 1 - l in float32, so where l is 1e-5 it has three digits
    data = 0.5 * torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = ap.log_noise_levels(30)
    stats = ap.estimate_statistics(
        ap.GaussianDenoiser(torch.tensor(0.25).double()), data, levels, 128, progress=False, per_element=True,
        intercept=True,
    )  # fmt: skip
    for per, shape in (("element", (3, 2, 2)), ("channel", (3, 1, 1)), ("sample", (1, 1, 1))):
        save_ems(stats, tmp_path / per, per=per, num_steps=29)
        ems = load_ems(tmp_path / per)
        assert ems.l.shape == ems.s.shape == (30, *shape)
        assert ems.s.eq(0).all()
        assert ems.b.abs().max() < 1e-6
        torch.testing.assert_close(ems.levels, levels)
        torch.testing.assert_close(ems.l[:, 0, 0, 0], 0.25 / (0.25 + levels**2), rtol=0, atol=6e-8)

    precond = PerElementPreconditioning.from_coefficients(ems.levels, ems.l, ems.s)
    scalar = ap.AnalyticPreconditioning.from_coefficients(ems.levels, ems.l.flatten(), ems.s.flatten())
    torch.testing.assert_close(precond(5.0, 1.0).c_out.flatten()[0], scalar(5.0, 1.0).c_out, rtol=1e-9, atol=0)


def test_other_levels_are_resampled(tmp_path: Path) -> None:
    data = PROBLEM.sample(64, 0).reshape(-1, 6, 1, 1)
    denoiser = image_denoiser(PROBLEM.denoiser)
    stats = ap.estimate_statistics(
        denoiser, data, ap.karras_noise_levels(80), 128, progress=False, per_element=True, batch_size=4096
    )
    save_ems(stats, tmp_path)
    ems = load_ems(tmp_path)
    c = PROBLEM.variances
    # float32 of 1 - l; Karras's levels are 0.4 apart in lambda at the clean end
    torch.testing.assert_close(ems.l[:, :, 0, 0], c / (c + ems.levels[:, None] ** 2), rtol=0, atol=1e-5)


def test_bad_statistics(tmp_path: Path) -> None:
    flat = ap.estimate_statistics(ap.GaussianDenoiser(1.0), torch.ones(8, 4), num_samples=16, progress=False)
    with pytest.raises(ValueError, match=r"samples \(C, H, W\), got sample shape \(4,\)"):
        save_ems(flat, tmp_path)
    image = ap.estimate_statistics(ap.GaussianDenoiser(1.0), torch.ones(8, 4, 1, 1), num_samples=16, progress=False)
    with pytest.raises(ValueError, match="or save per='sample'"):
        save_ems(image, tmp_path)
    with pytest.raises(ValueError, match="per must be one of"):
        save_ems(image, tmp_path, per="pixel")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        save_ems(image, tmp_path, per="sample", num_steps=0)
    with pytest.raises(FileNotFoundError, match="expected an existing folder to make b in"):
        save_ems(image, tmp_path / "a" / "b", per="sample")
    with pytest.raises(TypeError, match="must be TeacherStatistics, got int"):
        save_ems(1, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_steps must be an int, got 1\.5"):
        save_ems(image, tmp_path, num_steps=1.5)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def scalar_statistics(l: float) -> ap.TeacherStatistics:
    data = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2, 1, 1)
    return ap.estimate_statistics(lambda x, t: l * x, data, ap.log_noise_levels(8), num_samples=16, progress=False)


def test_what_float32_does_not_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"l must be finite in float32, which the files hold, got 1201 of 1201 values"):
        save_ems(scalar_statistics(1e45), tmp_path / "new", per="sample")
    assert not list(tmp_path.iterdir())
    save_ems(scalar_statistics(1e37), tmp_path / "new", per="sample")
    assert load_ems(tmp_path / "new").l.flatten()[0].item() == pytest.approx(1e37)


def test_folders_that_are_none(tmp_path: Path) -> None:
    stats = scalar_statistics(0.5)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "odd" / "sb.npz").mkdir(parents=True)
    for name in ("file", "dangling"):
        with pytest.raises(ValueError, match=f"expected a folder to write to, got .*{name}, a file or a broken link"):
            save_ems(stats, tmp_path / name, per="sample")
    with pytest.raises(ValueError, match=r"expected a folder to write sb\.npz to, got one with a folder of that name"):
        save_ems(stats, tmp_path / "odd", per="sample")
    with pytest.raises(FileNotFoundError, match="check the folder"):
        load_ems(tmp_path / "file")
    assert os.listdir(tmp_path / "odd") == ["sb.npz"]


@pytest.mark.parametrize("at", range(6))
def test_an_interruption_never_mixes_two_teachers(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ems(scalar_statistics(0.5), tmp_path, per="sample")
    steps = iter(range(6))  # whatever changes the folder: two files opened and synced, two put in place

    def interrupted(step: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(steps) == at:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for place, name in ((np, "savez"), (os, "fsync"), (os, "replace")):
            patched.setattr(place, name, interrupted(getattr(place, name)))
        with pytest.raises(KeyboardInterrupt):
            save_ems(scalar_statistics(0.25), tmp_path, per="sample", num_steps=600)
    if at < 4:  # nothing was replaced yet
        assert load_ems(tmp_path).l.shape == (1201, 1, 1, 1)
    else:
        with pytest.raises(FileNotFoundError, match=r"no file at .*l\.npz"):
            load_ems(tmp_path)
    assert not list(tmp_path.glob(".*"))
    save_ems(scalar_statistics(0.25), tmp_path, per="sample", num_steps=600)
    assert load_ems(tmp_path).l.unique().item() == 0.25


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".l.npz.{dead.pid}.tmp", f".sb.npz.{dead.pid}.tmp", f".other.npz.{dead.pid}.tmp"):
        (tmp_path / name).touch()
    save_ems(scalar_statistics(0.5), tmp_path, per="sample")
    assert sorted(os.listdir(tmp_path)) == [f".other.npz.{dead.pid}.tmp", "l.npz", "sb.npz"]


class Poison:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ones = np.ones((3, 1, 2, 2), dtype=np.float32)

    def write(**arrays: object) -> None:
        np.savez("l.npz", l=arrays.get("l", ones))  # type: ignore[arg-type]
        np.savez("sb.npz", s=arrays.get("s", ones), b=arrays.get("b", ones))  # type: ignore[arg-type]

    with pytest.raises(FileNotFoundError, match=r"no file at l\.npz"):
        load_ems(".")
    write()
    assert load_ems(".", 0.1, 1.0).levels.tolist() == pytest.approx([1.0, 0.1**0.5, 0.1])
    for bad in (
        {"l": ones[:2]},
        {"s": ones[0]},
        {"b": np.ones((3, 1, 3, 2))},
        {"l": ones[:1], "s": ones[:1]},
        {"l": ones[0, 0, 0, 0]},
        {name: ones[:, :, :0] for name in "lsb"},
        {"s": ones[:, :, :0]},
    ):
        write(**bad)
        with pytest.raises(ValueError, match=r"must be of shapes like \(N \+ 1, C, H, W\)"):
            load_ems(".")
    some_nan = ones.copy()
    some_nan[1, 0, 0] = np.nan
    for bad, message in (
        ({"l": ones * np.inf}, "l must be finite, got 12 NaN or infinite of 12 values"),
        ({"b": some_nan}, "b must be finite, got 2 NaN or infinite of 12 values"),
        ({"s": ones.astype(np.longdouble) * np.longdouble("1e4000")}, "s must be finite, got 12"),
        ({"s": ones.astype(int)}, "s must hold floating-point numbers, got int64"),
        ({"b": np.array([Poison()])}, "Object arrays cannot be loaded"),
        ({"l": np.array(1j)}, "l must hold floating-point numbers, got complex128"),
    ):
        write(**bad)
        with pytest.raises(ValueError, match=f"got another or a damaged file: {message}"):
            load_ems(".")
    for content in (b"", b"PK\x03\x04", pickle.dumps(Poison()), Path("sb.npz").read_bytes()[:-30]):
        write()
        Path("sb.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected arrays .* in sb\.npz"):
            load_ems(".")
    with open("sb.npz", "wb") as file:
        np.save(file, ones)
    with pytest.raises(ValueError, match="damaged"):
        load_ems(".")
    np.savez("sb.npz", s=ones)
    with pytest.raises(ValueError, match="damaged"):
        load_ems(".")
    Path("sb.npz").unlink()
    os.mkfifo("sb.npz")
    with pytest.raises(ValueError, match="no regular file"):
        load_ems(".")
    assert not Path("executed").exists()


def test_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "ems.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) > 2
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"ems.md, block {number}", "exec"), namespace)
