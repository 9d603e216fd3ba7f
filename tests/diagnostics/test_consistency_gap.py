"""The consistency gap against closed forms: GaussianProblem data, whose flow and denoiser are linear per coordinate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_size import FullSize
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import coefficient_tables, gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.diagnostics.consistency_gap import ConsistencyGap, GapMap, consistency_gap, gap_map
from analytic_precond.diagnostics.plots import plot_gap_map
from analytic_precond.testing import GaussianProblem

_K = np.arange(1, 1025) ** -1.5
IMAGE_LIKE = gaussian_problem(tuple((0.25 * _K / _K.mean()).tolist()))  # spectrum of images, mean variance 0.25
SMALL = gaussian_problem()
CTM = ap.CTMPreconditioning()
FORMS = ("CTM", "backward", "forward")

# RMS of D* - D(x_t, t) and of D* - D(x_s, s), from an independent prototype with the flow in closed form
JUMPS: dict[tuple[float, float], tuple[tuple[float, float], ...]] = {
    (80.0, 5.0): ((0.1975, 0.1080), (0.3018, 0.0295), (0.0052, math.nan)),
    (20.0, 5.0): ((0.1204, 0.0743), (0.1899, 0.0261), (0.0163, math.nan)),
    (5.0, 1.0): ((0.1035, 0.0510), (0.1294, 0.0396), (0.0624, math.nan)),
    (1.0, 0.1): ((0.0822, 0.0290), (0.0940, 0.0168), (0.0626, math.nan)),
}


def preconditionings(problem: GaussianProblem) -> dict[str, ap.Preconditioning]:
    levels, l, s = coefficient_tables(problem, 120)
    analytic = ap.AnalyticPreconditioning.from_coefficients
    return {"CTM": CTM, **{form: analytic(levels, l, s, discretization=form) for form in FORMS[1:]}}


def typical(problem: GaussianProblem, t: float) -> Tensor:
    """One sample of x_t whose squares are their expectations: the RMS of a linear map of it is an expectation."""
    return (problem.variances + t**2).sqrt()[None]


def closed_form(problem: GaussianProblem, t: float, s: float, c_skip: float, c_out: float) -> tuple[float, float]:
    c = problem.variances.numpy()
    x_t, x_s = np.sqrt(c + t**2), np.sqrt(c + s**2)  # the flow carries one to the other
    required = (x_s - c_skip * x_t) / c_out
    gaps = required - c / (c + t**2) * x_t, required - c / (c + s**2) * x_s
    return float(np.sqrt((gaps[0] ** 2).mean())), float(np.sqrt((gaps[1] ** 2).mean()))


class Counter:
    """A teacher that counts the samples it evaluates."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.evaluations = denoiser, 0

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.evaluations += len(x)
        result: Tensor = self.denoiser(x, t, **condition)
        return result


# the gap of one batch


@pytest.mark.parametrize("jump", JUMPS, ids=lambda jump: f"{jump[0]:g} to {jump[1]:g}")
def test_published_figures_to_four_digits(jump: tuple[float, float]) -> None:
    teacher = IMAGE_LIKE.denoiser
    for expected, precond in zip(JUMPS[jump], preconditionings(IMAGE_LIKE).values(), strict=True):
        gap = consistency_gap(teacher, precond, typical(IMAGE_LIKE, jump[0]), *jump)
        assert round(gap.start.item(), 4) == expected[0]
        if not math.isnan(expected[1]):
            assert round(gap.target.item(), 4) == expected[1]


@pytest.mark.parametrize("jump", JUMPS, ids=lambda jump: f"{jump[0]:g} to {jump[1]:g}")
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_exact_flow(form: str, jump: tuple[float, float]) -> None:
    """Here the coefficients, too, are not the library's: s/t, or adaptive quadrature of the definitions."""
    t, s = jump
    c_skip, c_out = (s / t, 1 - s / t) if form == "CTM" else map(float, SMALL.jump(t, s, float(form == "backward")))
    gap = consistency_gap(SMALL.denoiser, preconditionings(SMALL)[form], typical(SMALL, t), t, s)
    # the solver's error in D* is at most 4e-9, measured, for 80 to 5; the analytic coefficients' is the larger
    assert [g.item() for g in gap] == pytest.approx(closed_form(SMALL, t, s, c_skip, c_out), rel=1e-4, abs=2e-5)


def test_fifth_order_in_the_number_of_steps() -> None:
    t, s = 80.0, 1.0  # far enough for errors above rounding
    exact = closed_form(SMALL, t, s, s / t, 1 - s / t)[0]
    steps = np.array([4, 8, 16, 32])
    errors = [
        abs(consistency_gap(SMALL.denoiser, CTM, typical(SMALL, t), t, s, num_steps=n).start.item() - exact)
        for n in steps.tolist()
    ]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order > 5.0 - 0.2  # 6.1 measured: the method's fifth-order error is small


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.001, 10.0), min_size=1, max_size=5),
    st.floats(0.02, 80.0),
    st.floats(0.05, 0.9),
)
def test_closed_form_for_any_gaussian(variances: list[float], t: float, ratio: float) -> None:
    problem, s = gaussian_problem(tuple(variances)), ratio * t
    gap = consistency_gap(problem.denoiser, CTM, typical(problem, t), t, s)
    expected = closed_form(problem, t, s, s / t, 1 - s / t)
    size = math.sqrt(max(variances))  # of D; jumps of 20 in t cost the solver digits
    assert [g.item() for g in gap] == pytest.approx(expected, rel=1e-2, abs=1e-4 * size)


@pytest.mark.parametrize("form", FORMS)
def test_short_jumps_ask_for_the_teacher(form: str) -> None:
    """D* tends to D as s tends to t, linearly, whatever the preconditioning."""
    precond = preconditionings(SMALL)[form]
    short, shorter = (
        consistency_gap(SMALL.denoiser, precond, typical(SMALL, 2.0), 2.0, 2.0 * (1 - h)) for h in (1e-2, 1e-3)
    )
    for long_gap, short_gap in zip(short, shorter, strict=True):
        assert long_gap.item() / short_gap.item() == pytest.approx(10, rel=0.02)  # to first order in h


def test_levels_per_sample_and_batch_rms() -> None:
    t, s = torch.tensor([80.0, 5.0, 1.0]), torch.tensor([5.0, 1.0, 0.1])
    x_t = torch.cat([typical(SMALL, level) for level in t.tolist()])
    together = consistency_gap(SMALL.denoiser, CTM, x_t, t, s)
    assert together.start.shape == together.target.shape == (3,)
    for i in range(3):
        alone = consistency_gap(SMALL.denoiser, CTM, x_t[i : i + 1], t[i].item(), s[i : i + 1])
        # 0.1 is float32's here
        torch.testing.assert_close(together.start[i : i + 1], alone.start, rtol=1e-6, atol=0)
        torch.testing.assert_close(together.target[i : i + 1], alone.target, rtol=1e-6, atol=0)


def test_images_in_half_precision_conditions_and_the_teachers_dtype() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            assert x.dtype == t.dtype == torch.float32
            assert label.shape == t.shape
            return self.scale * label[:, None, None, None] * x / (1 + t[:, None, None, None] ** 2)

    x_t = 3 * torch.ones(2, 1, 4, 4, dtype=torch.bfloat16)
    gap = consistency_gap(Teacher(), CTM, x_t, 2.0, 1.0, label=torch.tensor([1.0, 0.0]))
    assert gap.start.dtype == torch.float64
    assert not gap.start.requires_grad
    # label 1: N(0, 1) data. label 0: all data are 0, the flow is x s/t, and so is CTM's jump
    expected = closed_form(gaussian_problem((1.0,)), 2.0, 1.0, 0.5, 0.5)
    for value, size in zip(gap, expected, strict=True):
        assert value.tolist() == pytest.approx([3 / 5**0.5 * size, 0.0], rel=1e-4, abs=1e-6)  # a float32 teacher


def test_teacher_evaluations_are_as_documented() -> None:
    teacher = Counter(SMALL.denoiser)
    consistency_gap(teacher, CTM, typical(SMALL, 2.0).expand(5, -1), 2.0, 1.0, num_steps=4)
    assert teacher.evaluations == 5 * (3 * 4 + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_agrees() -> None:
    x_t = typical(SMALL, 5.0).expand(2, -1)
    t, s = torch.tensor([5.0, 5.0]), torch.tensor([1.0, 5.0])
    on_gpu = consistency_gap(copy.deepcopy(SMALL.denoiser).cuda(), CTM, x_t.cuda(), t.cuda(), s.cuda())
    assert on_gpu.start.device.type == "cuda"
    assert bool(torch.isnan(on_gpu.start[1]))  # s = t is not looked for
    on_cpu = consistency_gap(SMALL.denoiser, CTM, x_t[:1], t[:1], s[:1])
    torch.testing.assert_close(on_gpu.start[:1].cpu(), on_cpu.start, rtol=1e-9, atol=0)


# the map


def antithetic(problem: GaussianProblem) -> tuple[Tensor, Tensor]:
    """x_0 and n for which x_0 + t n has squares c + t^2 on average over the two samples, at every t."""
    x_0 = problem.variances.sqrt().repeat(2, 1)
    return x_0, torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand_as(x_0)


def test_map_agrees_with_the_exact_flow() -> None:
    levels = ap.log_noise_levels(6, 0.01, 20.0)
    named = preconditionings(IMAGE_LIKE)
    gaps = gap_map(IMAGE_LIKE.denoiser, named, *antithetic(IMAGE_LIKE), levels, num_steps=24, progress=False)
    assert gaps.names == FORMS
    assert torch.equal(gaps.levels, levels)
    for p, precond in enumerate(named.values()):
        for i, t in enumerate(levels.tolist()):
            for j, s in enumerate(levels.tolist()):
                found = [gaps.start[p, i, j].item(), gaps.target[p, i, j].item()]
                if j <= i:
                    assert np.isnan(found).all()
                else:
                    c_skip, c_out = (c.item() for c in precond(t, s))
                    assert found == pytest.approx(closed_form(IMAGE_LIKE, t, s, c_skip, c_out), rel=2e-3, abs=2e-6)


def test_default_steps_of_the_map_give_two_digits() -> None:
    """On the grid of ten levels that the documentation speaks of."""
    levels = ap.log_noise_levels(10)
    gaps = gap_map(IMAGE_LIKE.denoiser, {"CTM": CTM}, *antithetic(IMAGE_LIKE), levels, progress=False)
    for i, j in [(0, 1), (0, 9), (3, 5), (8, 9)]:
        t, s = levels[i].item(), levels[j].item()
        expected = closed_form(IMAGE_LIKE, t, s, s / t, 1 - s / t)
        assert (gaps.start[0, i, j].item(), gaps.target[0, i, j].item()) == pytest.approx(expected, rel=1e-2)


def test_map_starts_every_level_afresh() -> None:
    """Not on one trajectory from the top: a biased teacher's would leave the law of x_0 + t n."""

    def biased(x: Tensor, t: Tensor) -> Tensor:
        return 0 * x  # although all data are 1

    x_0, noise = torch.ones(1, 1), torch.ones(1, 1)
    with_one = ap.AnalyticPreconditioning.from_coefficients(
        *(torch.tensor(v) for v in ([4.0, 1.0], [0.0] * 2, [1.0] * 2))
    )
    gaps = gap_map(biased, {"a": with_one}, x_0, noise, torch.tensor([4.0, 2.0, 1.0]), progress=False)
    for i, t in enumerate((4.0, 2.0)):
        c_skip, c_out = with_one(t, 1.0)
        x_t = 1 + t  # the teacher's flow is x s / t
        assert gaps.start[0, i, 2].item() == pytest.approx(abs(x_t / t - c_skip.item() * x_t) / c_out.item(), rel=1e-5)


def test_map_costs_what_is_documented_and_takes_conditions() -> None:
    teacher = Counter(lambda x, t, scale: scale * x / (1 + t[:, None] ** 2))
    with global_rng_untouched():
        gap_map(
            teacher,
            {"CTM": CTM, "again": CTM},
            torch.ones(3, 2),
            torch.ones(3, 2),
            torch.tensor([4.0, 2.0, 1.0, 0.5]),
            num_steps=2,
            progress=False,
            scale=torch.ones(3, 1),
        )
    assert teacher.evaluations == 3 * (6 * 6 + 3)


# bad input

X = torch.ones(2, 3)
LEVELS = torch.tensor([2.0, 1.0, 0.5])


def measure(
    precond: Any = CTM, x_t: Any = X, t: Any = 2.0, s: Any = 1.0, teacher: Any = None, **options: Any
) -> ConsistencyGap:
    return consistency_gap(teacher, precond, x_t, t, s, **options)


def chart(
    preconds: Any = None, x_0: Any = X, noise: Any = X, levels: Any = LEVELS, teacher: Any = None, **options: Any
) -> GapMap:
    named = {"CTM": CTM} if preconds is None else preconds
    return gap_map(teacher, named, x_0, noise, levels, progress=False, **options)


NARROW = ap.AnalyticPreconditioning.from_coefficients(LEVELS, 0 * LEVELS, 0 * LEVELS)


@pytest.mark.parametrize(
    ("call", "options", "error", "match"),
    [
        (measure, {"precond": "CTM"}, TypeError, r"precond must be a Preconditioning, got str: e\.g\. CTMPrecond"),
        (measure, {"x_t": X[:0]}, ValueError, r"x_t must be a batch of at least one sample, .*got \(0, 3\)"),
        (measure, {"x_t": [1.0]}, TypeError, r"x_t must be a torch\.Tensor, got list"),
        (measure, {"t": torch.ones(3)}, ValueError, r"t must hold one noise level per sample, shape \(2,\)"),
        (measure, {"t": 2}, TypeError, r"t must be a noise level .* got 2 \(int\): write"),
        (measure, {"s": 2.0}, ValueError, r"t > s needed, got s = t at position 0"),
        (measure, {"s": 3.0}, ValueError, r"s <= t.*got t = 2, s = 3 at position 0"),
        (measure, {"s": 0.0}, ValueError, r"s must be finite and positive, got 0 at position 0"),
        (measure, {"s": torch.tensor([1.0, 0.1]), "precond": NARROW}, ValueError, r"0\.5 <= s.*s = 0\.1.* position 1"),
        (measure, {"num_steps": 7}, ValueError, r"num_steps must be even, .* got 7"),
        (measure, {"num_steps": 0}, ValueError, r"num_steps must be at least 2, got 0"),
        (measure, {"teacher": 3}, TypeError, r"denoiser must be callable as denoiser\(x, t\), got int"),
        (chart, {"preconds": CTM}, TypeError, r"must be a dict of them by name, got CTMPreconditioning: {'CTM'"),
        (chart, {"preconds": {}}, ValueError, r"must hold at least one, got an empty dict"),
        (chart, {"preconds": {"a": 1}}, TypeError, r"preconditionings\['a'\] must be a Preconditioning, got int"),
        (chart, {"preconds": {"a": NARROW}, "levels": 2 * LEVELS}, ValueError, r"s <= t <= 2 .*got t = 4"),
        (chart, {"preconds": {"a": ap.CMPreconditioning()}}, ValueError, r"s must be sigma_min = 0\.002"),
        (chart, {"noise": X[:1]}, ValueError, r"noise must have x_0's shape \(2, 3\), got \(1, 3\)"),
        (chart, {"noise": None}, TypeError, r"noise must be a torch\.Tensor, got NoneType"),
        (chart, {"x_0": X[:0], "noise": X[:0]}, ValueError, r"x_0 must be a batch of at least one sample"),
        (chart, {"x_0": None}, TypeError, r"x_0 must be a torch\.Tensor, got NoneType"),
        (chart, {"levels": LEVELS.flip(0)}, ValueError, r"levels must be strictly decreasing"),
        (chart, {"levels": torch.tensor([1.0, 0.0])}, ValueError, r"levels must be positive"),
        (chart, {"num_steps": 2.5}, TypeError, r"num_steps must be an int, got 2\.5"),
        (chart, {"teacher": "net"}, TypeError, r"denoiser must be callable as denoiser\(x, t\), got str"),
        (plot_gap_map, {"gaps": None}, TypeError, r"gaps must be a GapMap, got NoneType: call gap_map first"),
    ],
)
def test_refused_before_the_teacher_is_called(
    call: Callable[..., object], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    counter = Counter(SMALL.denoiser)
    if call is not plot_gap_map and "teacher" not in options:
        options = {**options, "teacher": counter}
    with pytest.raises(error, match=match):
        call(**options)
    assert counter.evaluations == 0


# the picture


@pytest.fixture(scope="module")
def gaps() -> GapMap:
    levels = ap.log_noise_levels(5)
    return gap_map(SMALL.denoiser, preconditionings(SMALL), *antithetic(SMALL), levels, num_steps=2, progress=False)


def test_heat_maps_show_the_gaps_on_one_scale(gaps: GapMap, tmp_path: Path) -> None:
    figure = plot_gap_map(gaps)
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels[: len(FORMS)]] == list(FORMS)
    rows = [panel.get_ylabel() for panel in panels[:: len(FORMS)]]
    assert rows == [f"gap at the {end} of the jump\n\nto noise level $s$" for end in ("start", "target")]
    assert {panel.get_xscale() + panel.get_yscale() for panel in panels} == {"loglog"}
    assert bar.get_ylabel() == "RMS consistency gap"
    maps = [panel.collections[0] for panel in panels]
    assert {(m.norm.vmin, m.norm.vmax) for m in maps} == {(maps[0].norm.vmin, maps[0].norm.vmax)}
    for drawn, values in zip(maps, [*gaps.start, *gaps.target], strict=True):
        np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), values.T)  # t along x, s along y
    x_edges = maps[0].get_coordinates()[0, :, 0]
    inside = (gaps.levels[1:] * gaps.levels[:-1]).sqrt()
    np.testing.assert_allclose(x_edges[1:-1], inside, rtol=1e-12)  # half-way in ln t

    figure.savefig(tmp_path / "figure.png", dpi=40)  # under the tests' rule that warnings are errors
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_gaps_of_zero_can_be_drawn(gaps: GapMap, tmp_path: Path) -> None:
    """A preconditioning that fits the teacher has no gap, which a logarithmic scale cannot show."""
    none = GapMap(("perfect",), gaps.levels, 0 * gaps.start[:1], 0 * gaps.target[:1])
    some = GapMap(("perfect", "CTM"), gaps.levels, *(torch.cat([0 * v[:1], v[:1]]) for v in (gaps.start, gaps.target)))
    plot_gap_map(none).savefig(tmp_path / "figure.png", dpi=40)
    scale = plot_gap_map(some).axes[0].collections[0].norm
    assert scale.vmin == pytest.approx(1e-3 * scale.vmax)  # three decades


VARIANCES = 0.25 * (torch.arange(1.0, 65.0) ** -1.5) / (torch.arange(1.0, 65.0) ** -1.5).mean()


def float32_teacher(x: Tensor, t: Tensor) -> Tensor:
    return x * (VARIANCES.to(x) / (VARIANCES.to(x) + t[:, None] ** 2))


# errors of float32 outputs: 1e-7 of D over the gap, which is as small as the jump is short
@pytest.mark.parametrize(
    ("t", "s", "rtol"), [(80.0, 5.0, 2e-6), (80.0, 79.0, 2e-4), (1.0, 0.99, 2e-4), (0.004, 0.002, 5e-3)]
)
def test_a_float32_teacher_is_followed_as_well_as_it_answers(t: float, s: float, rtol: float) -> None:
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x_t = (VARIANCES + t**2).sqrt() * noise
    with FullSize(x_t.numel()) as watched:
        gap = consistency_gap(float32_teacher, CTM, x_t, t, s)
    assert watched.share == 0  # it was 76 %
    assert gap.start.dtype == torch.float64

    x, c = x_t.double(), VARIANCES.double()
    x_s = x * ((c + s**2) / (c + t**2)).sqrt()
    required = (x_s - s / t * x) / (1 - s / t)
    for got, said in zip(gap, (x * c / (c + t**2), x_s * c / (c + s**2)), strict=True):
        torch.testing.assert_close(got, (required - said).square().mean(1).sqrt(), rtol=rtol, atol=0)


@pytest.mark.parametrize("s", [79.9, 79.0, 5.0, 0.002])
def test_a_required_output_in_float32_adds_no_rounding_to_that_of_the_data(s: float) -> None:
    x_t = 80 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x_s = CTM.jump(x_t, x_t.sin(), 80.0, s)
    with FullSize(x_t.numel()) as watched:
        required = CTM.required_output(x_t, x_s, 80.0, s)
    assert watched.share == 0  # it was 85 %
    wide = CTM.required_output(x_t.double(), x_s.double(), 80.0, s)
    of_the_data = (wide - x_t.sin()).abs().max() + 1e-6  # by the rounding of x_s
    assert (required - wide).abs().max() < 0.1 * of_the_data + 1e-6


def test_a_teacher_may_reuse_its_output() -> None:
    """As a compiled network with static buffers does: its next answer overwrites the last."""
    buffers: dict[int, Tensor] = {}

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return x / (1 + t[:, None] ** 2) + 0.1 * (x / (1 + t[:, None])).sin()

    def buffered(x: Tensor, t: Tensor) -> Tensor:
        return buffers.setdefault(len(x), torch.empty_like(x)).copy_(teacher(x, t))

    class AskedBelow(ap.CTMPreconditioning):
        told_lower_level = True

        def network_level(self, t: Tensor, s: Tensor | float) -> Tensor:
            return (t * s) ** 0.5

    levels, (x, noise) = torch.tensor([5.0, 1.0, 0.1]), torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    maps = [gap_map(D, {"below": AskedBelow()}, x, noise, levels, progress=False) for D in (teacher, buffered)]
    for found, expected in zip((maps[1].start, maps[1].target), (maps[0].start, maps[0].target), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
