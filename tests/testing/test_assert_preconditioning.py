"""`assert_preconditioning` passes what is right, ours and bare formulas, and names what is planted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import coefficient_tables, gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.testing import assert_preconditioning

PROBLEM = gaussian_problem()
D = 0.5  # sigma_data
V = D**2
COARSE = ap.log_noise_levels(24)

Function = Callable[[Tensor, Tensor], Any]


def analytic(theta: float = 1.0) -> ap.AnalyticPreconditioning:
    return ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(PROBLEM, 60), theta=theta)


def per_element() -> ap.PerElementPreconditioning:
    levels, l, s = coefficient_tables(PROBLEM, 60)
    return ap.PerElementPreconditioning.from_coefficients(
        levels, torch.stack([l, 0.5 * l], 1)[..., None], torch.stack([s, 0 * s], 1)[..., None]
    )


def fitted(of: Any, **options: Any) -> Any:
    return of.fit(PROBLEM.denoiser, PROBLEM.sample(64, 0), COARSE, num_trajectories=64, progress=False, **options)


def ctm_variance(root: bool) -> Function:
    """CTM's second formula, whose outer factor is the root of a ratio of variances, on the denoiser."""

    def variance(level: Tensor) -> Tensor:
        return (level - 0.002) ** 2 + V

    def precond(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        ratio = variance(s) / variance(t)
        g = ratio.sqrt() if root else ratio
        return g - (1 - s / t) * (1 - t * (t - 0.002) / variance(t)), 1 - s / t

    return precond


RIGHT: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **{f"ctm {outer}": lambda outer=outer: (ap.CTMPreconditioning(outer), {}) for outer in ("euler", "variance")},
    "bcm": lambda: (ap.BCMPreconditioning(), {}),
    "trigflow": lambda: (ap.TrigFlowPreconditioning(), {}),
    "flow map": lambda: (ap.FlowMapPreconditioning(), {}),
    "cm": lambda: (ap.CMPreconditioning(), {}),
    "ect": lambda: (ap.CMPreconditioning(sigma_min=0.0), {}),
    "backward": lambda: (analytic(), {}),
    "forward": lambda: (analytic(0.0), {}),
    "per element": lambda: (per_element(), {}),
    "least squares": lambda: (fitted(ap.LeastSquaresPreconditioning), {}),
    "per mode": lambda: (fitted(ap.PerModePreconditioning, basis=torch.eye(6)), {}),
    "shifted": lambda: (fitted(ap.ShiftedPreconditioning), {}),
    "bare": lambda: (lambda t, s: (s / t, 1 - s / t), {}),
    "bare, of another form": lambda: (ctm_variance(root=True), {}),
    "bare, on a network": lambda: (
        lambda t, s: ((V + t * s) / (V + t**2), D * (t - s) / (t**2 + V).sqrt()), {"sigma_data": D},
    ),
    "bare, to one level": lambda: (
        lambda t, s: (V / ((t - s) ** 2 + V), D * (t - s) / (t**2 + V).sqrt()), {"sigma_data": D, "target": 0.002},
    ),
    "bare, few levels": lambda: (lambda t, s: (s / t, 1 - s / t), {"levels": torch.tensor([5.0, 1.0, 0.1])}),
}  # fmt: skip


FITS = ("least squares", "per mode", "shifted")  # which take a second or more to fit


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.long] * (name in FITS)) for name, make in RIGHT.items()]
)
def test_what_is_right_passes(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    precond, options = make()
    assert_preconditioning(precond, **options, backend=None)


@pytest.mark.long
@pytest.mark.parametrize("name", ["backward", "per element", "bare"])
def test_what_is_right_compiles(name: str) -> None:
    precond, options = RIGHT[name]()
    assert_preconditioning(precond, **options)
    torch.compiler.reset()


def float32_inside(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    ratio = s.float() / t.float()
    return ratio.to(t.dtype), (1 - ratio).to(t.dtype)


def nan_in_a_corner(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return s / t, torch.where((t > 79) & (s < 0.0025), torch.nan, 1 - s / t)


def with_a_step(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return s / t + 1e-4 * ((s < 0.1) & (t > 0.1)), 1 - s / t


def of_first_pair(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """It does not broadcast: a column of t and a row of s give the diagonal of the table."""
    t, s = torch.broadcast_tensors(t, s)
    if t.ndim == 2:
        t = t[:, :1].expand_as(t)
        s = s[:1].expand_as(s).flip(1)
    return s / t, 1 - s / t


def reads_values(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    if (s > t).any().item():
        raise ValueError("s > t")
    return s / t, 1 - s / t


def rounded_to(num: int) -> Function:
    """Euler's jump between the nearest levels of a table."""
    table = ap.log_noise_levels(num)

    def nearest(level: Tensor) -> Tensor:
        return table[(table.log() - level.log()[..., None]).abs().argmin(-1)]

    return lambda t, s: (nearest(s) / nearest(t), 1 - nearest(s) / nearest(t))


# what is planted, and how the message begins and goes on
PLANTED: dict[str, tuple[Function, dict[str, Any], str]] = {
    "no boundary": (
        lambda t, s: (V / (t**2 + V) + 0 * s, t * D / (t**2 + V).sqrt() + 0 * s), {},
        r"boundary: c_skip: got 3\.9\d*e-05, expected 1, off by 1 at t = 80, s = 80\. ",
    ),
    "LCM's scalings": (
        lambda t, s: (V / ((10 * t) ** 2 + V) + 0 * s, 10 * t / ((10 * t) ** 2 + V).sqrt() + 0 * s), {},
        r"boundary: c_skip: .*They do not depend on s, like CM's and LCM's",
    ),
    "LCM's scalings of t - s": (
        lambda t, s: (V / ((10 * (t - s)) ** 2 + V), 10 * (t - s) / ((10 * (t - s)) ** 2 + V).sqrt()), {},
        r"read-out: .*c_skip is flat at s = t, like EDM's and LCM's",
    ),
    "a missing factor sigma_data": (
        lambda t, s: ((V + t * s) / (V + t**2), (t - s) / (t**2 + V).sqrt()), {"sigma_data": D},
        r"read-out: -t d/ds c_out: got 2, expected 1, off by 1 .*2 times the slope at all levels, "
        r"as if a factor \(sigma_data\?\) or a power were missing or extra",
    ),
    "a missing square root": (
        ctm_variance(root=False), {},
        r"read-out: t d/ds c_skip: .*c_skip has 1 to 2 times the slope: perhaps a square root, a power",
    ),
    "float32 inside": (float32_inside, {}, r"precision: c_out: .* off by .*e-0[78] at .* as short as 2e-04 t it is "),
    "float32 outside": (
        lambda t, s: (s.float() / t.float(), 1 - s.float() / t.float()), {}, r"dtype: .* got c_skip in torch\.float32",
    ),
    "detached": (
        lambda t, s: (s / t, (1 - s / t).detach()), {}, r"gradients: d/d[ts] c_out: got 0, expected .*perhaps detached",
    ),
    "detached in t only": (lambda t, s: (s / t.detach(), 1 - s / t.detach()), {}, r"gradients: d/dt c_skip: got 0"),
    "NaN in a corner": (nan_in_a_corner, {}, r"finite: c_out: got nan, .* at t = 80, s = 0\.002"),
    "a power": (
        lambda t, s: ((s / t) ** 0.5, 1 - (s / t) ** 0.5), {},
        r"read-out: .*Both have 0\.5 times the slope at all levels, like a power of s / t",
    ),
    "the sign of c_out": (lambda t, s: (s / t, s / t - 1), {}, r"read-out: .*c_out has the wrong sign"),
    "t and s swapped": (lambda t, s: (t / s, 1 - t / s), {}, r"read-out: .*Both have the wrong sign, as if t and s we"),
    "a step": (with_a_step, {}, r"smooth: d/ds c_skip: .* at t = 80, s = 0\.0998\d* It has a step or a corner|smooth"),
    "a root of a square": (
        lambda t, s: (s / t, ((t - s) ** 2).sqrt() / t), {}, r"read-out: .*got nan, .*not finite there, as that of the",
    ),
    "no broadcasting": (of_first_pair, {}, r"broadcast: c_skip: .*A pair of levels must give in a table what it gives"),
    "the shape of one level": (lambda t, s: (s / t, (1 - s / t)[:1]), {}, r"shape: .*\(820,\), got c_out of \(1,\)"),
    "no pair": (lambda t, s: s / t, {}, r"call: it must return two tensors, c_skip and c_out, got Tensor"),
    "an error": (lambda t, s: 1 / 0, {}, r"call: it must take .*\(1,\), torch.float64, got ZeroDivisionError: divis"),
    "a target that is missed": (
        lambda t, s: (V / ((t - s) ** 2 + V), D * t / (t**2 + V).sqrt()), {"sigma_data": D, "target": 0.002},
        r"boundary: c_skip: .* at t = 0\.002, s = 0\.002",
    ),
    "t clamped": (
        lambda t, s: euler(t.clamp(max=50.0), s), {},
        r"boundary: c_skip: got 1\.6, .*\. Right are those from t = 0\.002 to 49\.65, as if levels were clamped",
    ),
    "t and s clamped": (
        lambda t, s: euler(t.clamp(min=0.01), s.clamp(min=0.01)), {},
        r"read-out: .*Both are flat at s = t or right\. Right are those from t = 0\.01008 to 80, as if",
    ),
    "the nearest of few levels": (
        rounded_to(18), {}, r"read-out: .*Both are flat at s = t, like .*, or of levels rounded to a table's",
    ),
    "the nearest of many levels": (
        rounded_to(3000), {}, r"gradients: .*perhaps detached, under no_grad, of levels rounded to those",
    ),
    "levels rounded by torch": (
        lambda t, s: euler(t.log().mul(100).round().div(100).exp(), s.log().mul(100).round().div(100).exp()), {},
        r"gradients: d/dt c_skip: got 0, .*of levels rounded",
    ),
    "a multiple of ln(t / s)": (
        lambda t, s: (1 - (t / s).log() / 10, (t / s).log() / 10), {},
        r"read-out: .*Both have 0\.1 times the slope at all levels, like .*or a multiple of ln\(t / s\)",
    ),
    "both of a square": (
        lambda t, s: (1 - (1 - s / t) ** 2, (1 - s / t) ** 2), {},
        r"read-out: .*Both are flat at s = t, like functions of the square of t - s",
    ),
    "a power of c_skip": (
        lambda t, s: ((s / t) ** 2, 1 - s / t), {}, r"read-out: .*c_skip has 2 times .*, like a power",
    ),
    "a square": (lambda t, s: (s / t, (1 - s / t) ** 2), {}, r"read-out: .*c_out is flat at s = t, like the squ"),
    "c_skip and c_out swapped": (
        lambda t, s: (1 - s / t, s / t), {}, r"boundary: c_skip: .*changes nothing \(torch\.float64\)\.$",
    ),
    "values that are read": (reads_values, {"backend": "eager"}, r"compile: not into one graph: call: "),
}  # fmt: skip


@pytest.mark.parametrize(("precond", "options", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_what_is_planted_is_named(precond: Function, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_preconditioning(precond, **{"backend": None, **options})
    assert re.match(message, str(caught.value)), str(caught.value)


def euler(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return s / t, (t - s) / t


def euler_on_network(sigma_data: float) -> Function:
    def precond(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        total = t**2 + sigma_data**2
        return (t * s + sigma_data**2) / total, sigma_data * (t - s) / total.sqrt()

    return precond


def with_where(precond: Function) -> Function:
    def cut(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out = precond(t, s)
        return torch.where(s == t, 1.0, c_skip), torch.where(s == t, 0.0, c_out)

    return cut


def returns_early(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.ones_like(t), torch.zeros_like(t)) if torch.equal(t, s) else euler(t, s)


def on_epsilon(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(s / t), s - t


def epsilon_on_denoiser(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What the advice makes of it."""
    c_skip, c_out = on_epsilon(t, s)
    return c_skip + c_out / t, -c_out / t


# what is planted, what is said, and the same with the advice followed
ADVISED: dict[str, tuple[Function, dict[str, Any], str, Function, dict[str, Any]]] = {
    "no sigma_data": (euler_on_network(D), {}, "say sigma_data=0.5.", euler_on_network(D), {"sigma_data": 0.5}),
    "no sigma_data, 1": (euler_on_network(1.0), {}, "say sigma_data=1.", euler_on_network(1.0), {"sigma_data": 1.0}),
    "no sigma_data, 1/3": (
        euler_on_network(1 / 3), {}, "say sigma_data=0.33333333.", euler_on_network(1 / 3), {"sigma_data": 0.33333333},
    ),
    "another sigma_data": (
        euler_on_network(D), {"sigma_data": 1.0}, "say sigma_data=0.5, not 1.", euler_on_network(D), {"sigma_data": D},
    ),
    "sigma_data of a denoiser": (euler, {"sigma_data": D}, "on the denoiser: leave sigma_data out.", euler, {}),
    "where": (with_where(euler), {}, "The values are right, but the gradient of c_skip and c_out at s = t ", euler, {}),
    "where, on a network": (
        with_where(euler_on_network(D)), {"sigma_data": D}, "The values are right", euler_on_network(D),
        {"sigma_data": D},
    ),
    "an early return": (returns_early, {}, "as by torch.where, relu or an early return at t == s. Le", euler, {}),
    "relu": (lambda t, s: (s / t, (t - s).relu() / t), {}, "the gradient of c_out at s = t is cut off", euler, {}),
    "1.0001": (
        lambda t, s: (s / t, 1.0001 * (t - s) / t), {}, "c_out has 1.0001 times the slope at all levels", euler, {},
    ),
    "1.000005": (
        lambda t, s: (1 - 1.000005 * (t - s) / t, (t - s) / t), {}, "c_skip has 1.000005 times the slope", euler, {},
    ),
    "noise": (
        lambda t, s: (s / t, (t - s) / t * (1 + 1e-7 * t)), {}, "a larger rtol= is meant",
        lambda t, s: (s / t, (t - s) / t * (1 + 1e-7 * t)), {"rtol": 1e-4},
    ),
    "epsilon": (on_epsilon, {}, "They multiply epsilon = (x_t - D) / t. On the den", epsilon_on_denoiser, {}),
    "epsilon, with sigma_data": (on_epsilon, {"sigma_data": D}, "They multiply epsilon", epsilon_on_denoiser, {}),
    "t alone": (
        lambda t, s: (V / ((t - 0.002) ** 2 + V), D * (t - 0.002) / (t**2 + V).sqrt()), {"sigma_data": D},
        "They do not depend on s, like CM's and LCM's scalings: if all jumps end at one level, say target=.",
        lambda t, s: (V / ((t - 0.002) ** 2 + V), D * (t - 0.002) / (t**2 + V).sqrt()),
        {"sigma_data": D, "target": 0.002},
    ),
    "floats": (lambda t, s: (0.5, 0.5), {}, "got tuple of (float, float). Levels come as tensors", euler, {}),
    "None": (lambda t, s: (s / t, None), {}, "got tuple of (Tensor, NoneType)", euler, {}),
}  # fmt: skip


@pytest.mark.parametrize(("precond", "options", "words", "mended", "its"), ADVISED.values(), ids=ADVISED.keys())
def test_advice_that_is_followed_passes(
    precond: Function, options: dict[str, Any], words: str, mended: Function, its: dict[str, Any]
) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_preconditioning(precond, **options, backend=None)
    assert words in str(caught.value)
    assert_preconditioning(mended, **its, backend=None)


class Powers(nn.Module):
    """A right preconditioning for every power near 1, which a table, buffer or attribute holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        power = torch.tensor(1.1, dtype=torch.float64)
        if how == "attribute":
            self.power = power
        else:
            self.register_buffer("power", power, persistent=how != "not saved")

    def forward(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return (s / t) ** self.power + (1 - self.power) * (1 - s / t).neg(), 1 - s / t


class Copied(ap.CTMPreconditioning):
    """What a copy forgets."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        return Copied("variance")


class Jumping(ap.CTMPreconditioning):
    def jump(self, x_t: Tensor, denoised: Tensor, t: Any, s: Any) -> Tensor:
        return 1.001 * super().jump(x_t, denoised, t, s)


class Rounding(ap.Preconditioning):
    """Right for float64 levels, and computes those of float32 in float32."""

    def coefficients(self, t: Tensor, s: Tensor) -> ap.Scalings:
        return ap.Scalings(s / t, (t - s) / t)

    def forward(self, t: Any, s: Any) -> ap.Scalings:
        return ap.Scalings(s / t, 1 - s / t) if t.dtype == torch.float32 else super().forward(t, s)


class Elsewhere(ap.Preconditioning):
    """It makes a tensor on the CPU, wherever its levels are."""

    def coefficients(self, t: Tensor, s: Tensor) -> ap.Scalings:
        return ap.Scalings(s / t, (t - s) / t * torch.ones(t.shape, dtype=t.dtype, device="cpu"))


MODULES = {
    "attribute": (lambda: Powers("attribute"), r"state_dict: the tensor power is a plain attribute: call register_buf"),
    "not saved": (lambda: Powers("not saved"), r"state_dict: c_skip: .*does not hold all that the coefficients depend"),
    "rounded": (lambda: Powers("rounded"), r"half: c_skip: .*rounds its coefficients"),
    "copied": (Copied, r"deepcopy: c_skip: .*A copy computes something else"),
    "jumping": (Jumping, r"jump: .*jump must be c_skip x_t \+ c_out D"),
    "rounding": (lambda: Rounding(0.5), r"precision: c_out of float32 levels: .*computed in float64"),
    "elsewhere": (lambda: Elsewhere(0.5), r"device: all must be where the levels and the module are: "),
}


@pytest.mark.parametrize(("make", "message"), MODULES.values(), ids=MODULES.keys())
def test_what_happens_to_modules_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_preconditioning(make(), backend=None)
    assert re.match(message, str(caught.value)), str(caught.value)


def test_one_element_among_many_is_found() -> None:
    def precond(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.tensor([1.0, 1.0, 1.00001], dtype=torch.float64)
        ratio = (s / t)[..., None] * torch.ones(3, dtype=torch.float64)
        return ratio, (1 - ratio) * factor

    with pytest.raises(AssertionError, match=r"read-out: -t d/ds c_out: got 1\.00001"):
        assert_preconditioning(precond, COARSE, backend=None)
    assert_preconditioning(precond, COARSE, rtol=1e-4, backend=None)


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        assert_preconditioning(ap.CTMPreconditioning(), torch.tensor([0.1, 1.0]))
    with pytest.raises(ValueError, match="rtol must be positive and finite, got inf"):
        assert_preconditioning(ap.CTMPreconditioning(), rtol=float("inf"))
