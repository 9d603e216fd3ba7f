"""Hand-crafted preconditionings and the base class against reference outputs and identities."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from torch import Tensor, nn

import analytic_precond as ap

GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_FILE).items()}
OUTERS = ("euler", "variance", "euler_variance_mixed")
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]
MOVES = T > S  # one of the golden jumps goes from a level to itself


def analytic(**kwargs: object) -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40)
    l = 1 / (1 + 4 * levels**2)
    s = torch.tanh(levels.log()) - 0.3
    return ap.AnalyticPreconditioning.from_coefficients(levels, l, s, **kwargs)  # type: ignore[arg-type]


ALL = {
    **{f"ctm {outer}": ap.CTMPreconditioning(outer) for outer in OUTERS},
    "backward": analytic(),
    "forward": analytic(discretization="forward"),
    "theta 0.3": analytic(theta=0.3),
}
every = pytest.mark.parametrize("precond", ALL.values(), ids=ALL.keys())


@pytest.mark.parametrize("inner", ["no", "edm", "cm"])
@pytest.mark.parametrize("outer", OUTERS)
def test_ctm_jumps_agree_with_sony_ctm(outer: str, inner: str) -> None:
    denoised, jump = GOLDEN[f"sony_{inner}_{outer}_denoised"], GOLDEN[f"sony_{inner}_{outer}_jump"]
    # float64 on both sides; the reference undoes divisions by t down to 0.002
    torch.testing.assert_close(ap.CTMPreconditioning(outer).jump(X, denoised, T, S), jump, rtol=1e-11, atol=1e-11)


def test_edm_agrees_with_reference_code() -> None:
    edm = ap.EDMPreconditioning(0.5)(T)
    for name in ("c_skip", "c_out", "c_in"):
        torch.testing.assert_close(getattr(edm, name), GOLDEN[f"openai_edm_{name}"], rtol=1e-12, atol=0)
    torch.testing.assert_close(edm.c_noise, T.log() / 4)


@every
def test_on_network_is_the_same_jump(precond: ap.Preconditioning) -> None:
    edm = ap.EDMPreconditioning(precond.sigma_data)(T)
    F = torch.sin(X)
    denoised = ap.expand_to(edm.c_skip, X) * X + ap.expand_to(edm.c_out, X) * F
    c_skip, c_out = precond.on_network(T, S)
    by_network = ap.expand_to(c_skip, X) * X + ap.expand_to(c_out, X) * F
    torch.testing.assert_close(precond.jump(X, denoised, T, S), by_network, rtol=1e-12, atol=1e-12)


def test_ctm_euler_on_an_edm_network_is_trigflow() -> None:
    """An identity between families (both are rotations): g = (v + t s) / (v + t^2), f = d (t - s) / sqrt(t^2 + v)."""
    d = 0.5
    c_skip, c_out = ap.CTMPreconditioning(sigma_data=d).on_network(T, S)
    torch.testing.assert_close(c_skip, (d**2 + T * S) / (d**2 + T**2))
    torch.testing.assert_close(c_out, d * (T - S) / (T**2 + d**2).sqrt())


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_boundary_is_exact_in_every_dtype(precond: ap.Preconditioning, dtype: torch.dtype) -> None:
    t = ap.log_noise_levels(1001)[1:-1].to(dtype)
    t = t[(t >= 0.002) & (t <= 80)]
    c_skip, c_out = precond(t, t)
    # CTM's variance forms subtract g - 0 * ..., with g = 1 to rounding of the square root
    torch.testing.assert_close(c_skip, torch.ones_like(c_skip), rtol=1e-15, atol=0)
    assert torch.equal(c_out, torch.zeros_like(c_out))


@every
def test_read_out_recovers_the_denoiser(precond: ap.Preconditioning) -> None:
    x, denoised = X[:, 0, 0, 0], X[:, 1, 0, 0]
    t = torch.tensor([0.01, 0.1, 0.5, 2.0, 10.0, 60.0], dtype=torch.float64)
    slope = torch.func.jvp(lambda s: precond.jump(x, denoised, t, s), (t,), (torch.ones_like(t),))[1]
    # the tables hold N' = L S to 1e-12
    torch.testing.assert_close(x - t * slope, denoised, rtol=1e-9, atol=1e-9)


@every
def test_required_output_inverts_the_jump(precond: ap.Preconditioning) -> None:
    x, t, s = X[MOVES], T[MOVES], S[MOVES]
    required = precond.required_output(x, precond.jump(x, torch.sin(x), t, s), t, s)
    # float64's rounding of x_t, 200 * 1e-16, over the smallest c_out of these jumps
    torch.testing.assert_close(required, torch.sin(x), rtol=0, atol=1e-11)

    half = x.bfloat16()
    narrow = precond.required_output(half, 2 * half, t.float(), 0.002)
    assert narrow.dtype == torch.float32
    wide = precond.required_output(half.double(), 2 * half.double(), t.float(), 0.002)
    # float32's rounding of x_s and c_skip x_t, of up to 500, over c_out
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-4)


def test_required_output_of_an_euler_step_is_its_velocity() -> None:
    """CTM's Euler jump is x_s = x_t + (s - t) (x_t - D) / t."""
    x = X[MOVES]
    t, s = ap.expand_to(T[MOVES], x), ap.expand_to(S[MOVES], x)
    required = ap.CTMPreconditioning().required_output(x, torch.cos(x), T[MOVES], S[MOVES])
    torch.testing.assert_close(required, x - t * (torch.cos(x) - x) / (s - t), rtol=1e-12, atol=1e-12)


@every
def test_nothing_is_required_of_a_jump_from_a_level_to_itself(precond: ap.Preconditioning) -> None:
    t = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"t > s needed, got s = t at position 1: there the denoiser does not matter"):
        precond.required_output(t[:, None], t[:, None], t, torch.tensor([0.5, 2.0]))
    with pytest.raises(ValueError, match=r"s <= t.*got t = 1, s = 2 at position 0"):
        precond.required_output(t[:, None], t[:, None], 1.0, 2.0)
    with pytest.raises(ValueError, match=r"x_s must have x_t's shape \(2, 1\), got \(2,\)"):
        precond.required_output(t[:, None], t, 2.0, 1.0)
    with pytest.raises(TypeError, match=r"x_s must be a torch\.Tensor, got float"):
        precond.required_output(t[:, None], 1.0, 2.0, 1.0)  # type: ignore[arg-type]

    compiled = torch.compile(precond.required_output, fullgraph=True, backend="eager")
    assert torch.isnan(compiled(t, 2 * t, t, torch.tensor([0.5, 2.0]))).tolist() == [False, True]


@every
def test_gradients_in_both_levels(precond: ap.Preconditioning) -> None:
    t = torch.tensor([0.31, 7.0, 43.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.017, 1.3, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, s: tuple(precond(t, s)), (t, s), check_forward_ad=True)


@every
def test_dtypes(precond: ap.Preconditioning) -> None:
    exact = precond(80.0, 5.0)
    assert exact.c_out.dtype == torch.float64
    single = torch.tensor([80.0])
    for t, expected in ((single, torch.float32), (single.double(), torch.float64)):
        assert precond(t, 5.0).c_skip.dtype == expected
        torch.testing.assert_close(precond(t, 5.0).c_skip[0].double(), exact.c_skip, rtol=6e-8, atol=0)

    x = torch.ones(1, 3)
    for x_dtype, d_dtype in ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        jumped = precond.jump(x.to(x_dtype), x.to(d_dtype), single, single)
        assert jumped.dtype == torch.promote_types(x_dtype, d_dtype)
        assert torch.equal(jumped, x.to(jumped.dtype))


@every
def test_levels_broadcast(precond: ap.Preconditioning) -> None:
    t, s = torch.tensor([80.0, 5.0])[:, None], torch.tensor([0.01, 0.1, 1.0])
    grid = precond(t, s)
    assert grid.c_skip.shape == (2, 3)
    single = precond(5.0, torch.tensor(0.1))
    assert grid.c_skip[1, 1] == single.c_skip
    assert grid.c_out[1, 1] == single.c_out
    by_vmap = torch.vmap(lambda s: torch.stack(tuple(precond(t[:, 0], s))), out_dims=2)(s)
    torch.testing.assert_close(by_vmap, torch.stack(tuple(grid)))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        precond.jump(x, -x, t[:, 0], 0.1), precond.jump(x, -x, t[:, :, None], torch.full((2, 1, 1), 0.1))
    )


@every
def test_float32_end_points_are_tolerated_and_the_rest_is_not(precond: ap.Preconditioning) -> None:
    grid = GOLDEN["sony_times_18"]
    assert grid[-1] < 0.002
    assert bool(torch.isfinite(precond(grid[0], grid[-1]).c_out))
    with pytest.raises(ValueError, match=r"s <= t.*got t = 1, s = 1\.00001"):
        precond(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.00001]))


@every
def test_invalid_levels_are_nan_where_they_cannot_be_read(precond: ap.Preconditioning) -> None:
    t, s = torch.tensor([2.0, 1.0, float("nan"), -1.0]), torch.tensor([1.0, 2.0, 1.0, -2.0])
    mapped = torch.vmap(lambda t, s: tuple(precond(t, s)))
    compiled = torch.compile(precond, fullgraph=True, backend="eager")
    for function in (mapped, compiled):
        c_skip, c_out = function(t, s)
        assert torch.isnan(c_skip).tolist() == torch.isnan(c_out).tolist() == [False, True, True, True]
        assert c_out[0] == precond(t[0], s[0]).c_out


class Student(nn.Module):
    def __init__(self, precond: ap.Preconditioning) -> None:
        super().__init__()
        self.network = nn.Linear(3, 3)
        self.precond = precond

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.precond.jump(x, self.network(x), t, s)


class TestModule:
    """AnalyticPreconditioning inside a student: what happens to a module happens to it."""

    t, s = torch.tensor([80.0, 5.0, 0.5]), torch.tensor([1.0, 4.999, 0.002])

    def test_precision_survives_casts(self) -> None:
        student = Student(analytic())
        before = student.precond(self.t.double(), self.s.double())
        for cast in (student.half, student.bfloat16, lambda: student.to(torch.float16), student.float):
            cast()
            after = student.precond(self.t.double(), self.s.double())
            assert torch.equal(before.c_out, after.c_out)
            assert torch.equal(before.c_skip, after.c_skip)
        assert student.bfloat16().network.weight.dtype == torch.bfloat16

    def test_travels_in_the_checkpoint(self) -> None:
        theta = analytic(theta=0.4)
        file = io.BytesIO()
        torch.save(Student(theta).state_dict(), file)
        file.seek(0)
        # a placeholder with other tables, another range and another form
        levels = torch.tensor([20.0, 0.1])
        student = Student(ap.AnalyticPreconditioning.from_coefficients(levels, levels * 0, levels * 0))
        student.load_state_dict(torch.load(file, weights_only=True))
        assert student.precond.sigma_max == 80.0
        assert torch.equal(student.precond(self.t, self.s).c_out, theta(self.t, self.s).c_out)
        assert torch.equal(student.precond(self.t, self.s).c_skip, theta(self.t, self.s).c_skip)

    def test_copies_and_pickles(self) -> None:
        precond = analytic()
        for copied in (copy.deepcopy(precond), pickle.loads(pickle.dumps(precond))):
            assert torch.equal(copied(self.t, self.s).c_out, precond(self.t, self.s).c_out)
        averaged = torch.optim.swa_utils.AveragedModel(Student(precond))
        averaged.update_parameters(Student(precond))
        assert torch.equal(averaged.module.precond(self.t, self.s).c_out, precond(self.t, self.s).c_out)

    def test_has_no_parameters_and_ignores_autocast(self) -> None:
        precond = analytic()
        assert not list(precond.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            inside = precond(self.t, self.s)
        assert torch.equal(inside.c_out, precond(self.t, self.s).c_out)

    def test_compiles_without_graph_breaks(self) -> None:
        student = Student(analytic())
        x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(student, fullgraph=True)
        # float32 matrix products and fused arithmetic round differently
        torch.testing.assert_close(compiled(x, self.t, self.s), student(x, self.t, self.s), rtol=1e-5, atol=1e-6)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_gpu_agrees_and_never_synchronises(self) -> None:
        precond = analytic().cuda()
        t, s = self.t.cuda(), self.s.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            c_skip, c_out = precond(t, s)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(c_out.cpu(), analytic()(self.t, self.s).c_out)
        torch.testing.assert_close(c_skip.cpu(), analytic()(self.t, self.s).c_skip)

    def test_refuses_a_checkpoint_that_was_rounded(self) -> None:
        rounded = {name: value.half() for name, value in analytic().state_dict().items()}
        precond = analytic()
        with pytest.raises(RuntimeError, match=r"must be torch.float64, got torch.float16"):
            precond.load_state_dict(rounded)
        assert precond.sigma_min == 0.002

    def test_float_levels_follow_the_tables_to_their_device(self) -> None:
        assert analytic().to("meta")(5.0, 1.0).c_out.device.type == "meta"


class Minimal(ap.Preconditioning):
    """A preconditioning that returns a plain tuple."""

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return s / t, 1 - s / t


def test_a_subclass_may_return_a_tuple() -> None:
    x, D = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    own, ctm = Minimal(0.5), ap.CTMPreconditioning()
    torch.testing.assert_close(own.jump(x, D, 5.0, 1.0), ctm.jump(x, D, 5.0, 1.0))
    torch.testing.assert_close(own.on_network(5.0, 1.0), ctm.on_network(5.0, 1.0))
    with pytest.raises(NotImplementedError, match=r"Preconditioning must say coefficients\(t, s\)"):
        ap.Preconditioning(0.5)(5.0, 1.0)
