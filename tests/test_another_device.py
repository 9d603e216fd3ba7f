"""The whole public API on another device, which the meta device plays: nothing waits, mixes devices or ends a capture.

What is checked are the operations, not their values: those `test_gpu` compares where there is a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from another_device import MixesError, WaitsError, another_device
from problems import coefficient_tables, gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap

long = pytest.mark.long
THERE = torch.device("meta")
SHAPE = (2, 4, 3)
BATCH = 5
VARIANCES = gaussian_problem().variances.repeat(4).reshape(SHAPE)
GRID = ap.karras_noise_levels(10)
SIGMA_MIN = 0.002


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=THERE, dtype=dtype)


def batch() -> Tensor:
    return there(BATCH, *SHAPE)


def level() -> Tensor:
    return there(BATCH)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestTheMode:
    """It sees what it is to see."""

    @pytest.mark.parametrize(
        "act",
        [
            lambda: torch.ones(2).to(THERE),
            lambda: there(2).copy_(torch.ones(2)),
            lambda: there(4)[torch.tensor([0, 1])],
        ],
        ids=["a copy", "into memory", "an index"],
    )
    def test_waiting(self, act: Callable[[], object]) -> None:
        with pytest.raises(WaitsError), another_device():
            act()

    @pytest.mark.parametrize(
        "act",
        [lambda: there(2) + torch.ones(2), lambda: torch.where(torch.ones(2) > 0, there(2), 0.0)],
        ids=["a sum", "a choice"],
    )
    def test_mixing(self, act: Callable[[], object]) -> None:
        with pytest.raises(MixesError), another_device():
            act()

    def test_what_costs_nothing(self) -> None:
        with another_device() as mode:
            there(2) + torch.tensor(1.0)  # a number: an argument of the kernel
            torch.ones(2).to(THERE, non_blocking=True)
            there(3, 2).T[:1].expand(4, 3)
        assert mode.launches == 2  # the sum and the copy
        with pytest.raises(WaitsError, match="captured"), another_device(capturing=True):
            torch.ones(2).to(THERE, non_blocking=True)


# what is built on the CPU

SCHEDULES = {
    "edm": ap.EDMSchedule(),
    "vp": ap.VPLinearSchedule(),
    "cosine": ap.VPCosineSchedule(),
    "table": ap.VPDiscreteSchedule((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "flow": ap.RectifiedFlowSchedule(),
    "functions": ap.FunctionSchedule(lambda u: 1 - u, lambda u: u, times=(0.0, 1.0)),
    "trigflow": ap.TrigFlowSchedule(),
}


@cache
def preconditionings() -> dict[str, ap.Preconditioning]:
    levels, l, s = coefficient_tables(gaussian_problem(), 60)
    each = torch.ones(SHAPE, dtype=torch.float64)
    tables = (l[:, None, None, None] * each, s[:, None, None, None] * each)
    data = VARIANCES.sqrt() * torch.randn(32, *SHAPE, generator=seeded(), dtype=torch.float64)
    fit: dict[str, Any] = {"levels": ap.log_noise_levels(8), "num_trajectories": 32, "progress": False}
    teacher = ap.GaussianDenoiser(VARIANCES)
    analytic = ap.AnalyticPreconditioning.from_coefficients
    return {
        **{outer: ap.CTMPreconditioning(outer) for outer in ("euler", "variance", "euler_variance_mixed")},
        "CM": ap.CMPreconditioning(),
        "BCM": ap.BCMPreconditioning(),
        "TrigFlow": ap.TrigFlowPreconditioning(),
        "flow map": ap.FlowMapPreconditioning(),
        "backward": analytic(levels, l, s),
        "theta": analytic(levels, l, s, theta=0.4),
        "per element": ap.PerElementPreconditioning.from_coefficients(levels, *tables),
        "least squares": ap.LeastSquaresPreconditioning.fit(teacher, data, **fit),
        "cosines": ap.PerModePreconditioning.fit(teacher, data, **fit),
        "shifted": ap.ShiftedPreconditioning.fit(teacher, data, **{**fit, "levels": ap.log_noise_levels(20)}),
    }


NAMES = [
    "euler", "variance", "euler_variance_mixed", "CM", "BCM", "TrigFlow", "flow map", "backward", "theta",
    "per element", "least squares", "cosines", "shifted",
]  # fmt: skip
TWO_TIMES = [name for name in NAMES if name != "CM"]
each_precond = pytest.mark.parametrize("name", NAMES)


def moved(name: str) -> ap.Preconditioning:
    return copy.deepcopy(preconditionings()[name]).to(THERE)


def target(name: str, s: Any) -> Any:
    """What a jump may reach: one level only, for a Consistency Model."""
    return SIGMA_MIN if name == "CM" else s


@each_precond
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=long)], ids=str)
def test_preconditionings_can_be_captured(name: str, dtype: torch.dtype) -> None:
    precond, x = moved(name), there(BATCH, *SHAPE, dtype=dtype)
    t = there(BATCH, dtype=dtype)
    s = target(name, there(BATCH, dtype=dtype))
    with another_device(capturing=True):
        for levels in ((t, s), (5.0, target(name, 1.0)), (t[0], target(name, 1.0))):
            precond.jump(x, x, *levels)
            precond.required_output(x, x, *levels)
            precond.query(x, *levels)
            for scalings in (precond(*levels), precond.on_network(*levels)):
                if list(precond.buffers()) or levels[0] is t:
                    assert scalings.c_out.device == THERE
        slope = precond.jump(x.requires_grad_(), x, t.requires_grad_(), s).sum()
        torch.autograd.grad(slope, (x, t))


@each_precond
def test_levels_on_the_cpu_go_where_the_tables_are(name: str) -> None:
    precond = moved(name)
    here = torch.full((BATCH,), 5.0), target(name, torch.ones(BATCH))
    with another_device():
        precond.jump(batch(), batch(), *here)
        for function in (precond, precond.on_network):
            function(*here)
            function(here[0], target(name, level()))
            function(level(), here[1])


@pytest.mark.parametrize("name", TWO_TIMES)
def test_jumps_between_times_of_a_schedule_can_be_captured(name: str) -> None:
    for schedule in (SCHEDULES["flow"], SCHEDULES["table"]):
        precond, x = moved(name).on_schedule(schedule), batch()
        with another_device():
            precond(level(), level())  # the table is copied once
        with another_device(capturing=True):
            for times in ((level(), level()), (0.9, 0.1)):
                precond(*times)
                precond.jump(x, x, *times)
        with another_device():
            precond.jump(x, x, torch.full((BATCH,), 0.9), torch.full((BATCH,), 0.1))


@pytest.mark.parametrize("name", ["per element", *(pytest.param(n, marks=long) for n in ("backward", "least squares"))])
def test_numbers_and_levels_alone_compile_into_one_graph(name: str) -> None:
    """What the host reads on a GPU ends a graph here."""
    precond, t, s = preconditionings()[name], torch.tensor(5.0), torch.tensor(1.0)
    torch.compiler.reset()
    compiled = torch.compile(lambda t, s: tuple(precond(t, s)), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(t, s), precond(t, s), strict=True):
        torch.testing.assert_close(got, expected)
    torch.compiler.reset()


# students, their averages, losses and samplers


class Network(nn.Module):
    """A small network of x, noise levels or a time, and labels if it is given any."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.told, self.first, self.last = nn.Linear(3, 8), nn.Linear(24 + levels, 8), nn.Linear(8, 24)

    def forward(self, x: Tensor, *c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        hidden = self.first(torch.cat([x.flatten(1), *(c[:, None] for c in c_noise)], 1))
        if class_labels is not None:
            hidden = hidden + self.told(class_labels)
        y: Tensor = self.last(hidden.tanh())
        return y.view_as(x)


def trajectory_student(name: str) -> ap.ConsistencyTrajectoryModel:
    return ap.ConsistencyTrajectoryModel(Network(2), copy.deepcopy(preconditionings()[name])).to(THERE)


def consistency_student(name: str) -> ap.ConsistencyModel:
    return ap.ConsistencyModel(Network(1), copy.deepcopy(preconditionings()[name]), sigma_min=SIGMA_MIN).to(THERE)


def teacher() -> ap.GaussianDenoiser:
    return ap.GaussianDenoiser(VARIANCES).to(THERE)


@pytest.mark.parametrize("name", TWO_TIMES)
def test_a_training_step_can_be_captured(name: str) -> None:
    """Student, average, loss with one step of a teacher, and backward; times are drawn outside."""
    student, perfect, times = trajectory_student(name), teacher(), ap.JumpTimes(level(), level(), level())
    average = ap.exponential_moving_average(student, 0.9)
    average.update_parameters(student)
    with another_device(capturing=True):
        student(batch(), level(), level())
        student(batch(), 5.0, 1.0)
        options: dict[str, Any] = {"share_dropout": False, "num_steps": 1}
        loss = ap.trajectory_distillation_loss(perfect, student, average, batch(), batch(), times, **options).loss
        loss = loss + ap.denoising_loss(student.denoise, batch(), batch(), level()).loss
        loss = loss + ap.consistency_distillation_loss(None, student, average, batch(), batch(), times, **options).loss
        loss.backward()


# kernels, which the host launches one by one: of a call, of a student around a network of one, and of a loss with 17
# steps of a teacher of one; 72, 108 and 1013 before they were counted (CTM's: 21, 57 and 809)
@pytest.mark.parametrize(("name", "call", "jump", "loss"), [("euler", 20, 45, 400), ("backward", 45, 70, 510)])
def test_few_kernels_are_launched(name: str, call: int, jump: int, loss: int) -> None:
    precond = moved(name)
    student = ap.ConsistencyTrajectoryModel(lambda x, c_t, c_s: 0.5 * x, precond)
    times = ap.sample_jump_times(BATCH, ap.karras_noise_levels(18), generator=seeded())
    times = times._replace(t_index=0 * times.t_index, u_index=0 * times.u_index + 17)
    counts = []
    for work in (
        lambda: precond(level(), level()),
        lambda: student(batch(), level(), level()),
        lambda: ap.trajectory_distillation_loss(lambda x, t: 0.5 * x, student, student, batch(), batch(), times),
    ):
        with another_device() as mode:
            work()
        counts.append(mode.launches)
    assert all(counted <= allowed for counted, allowed in zip(counts, (call, jump, loss), strict=True)), counts


def test_students_around_denoisers_can_be_captured() -> None:
    precond = copy.deepcopy(preconditionings()["backward"])
    denoiser = ap.denoiser_from_network(Network(1), "v", SCHEDULES["table"]).to(THERE)
    one = ap.ConsistencyModel.from_denoiser(denoiser, precond).to(THERE)
    two = ap.ConsistencyTrajectoryModel.from_denoiser(lambda x, t, s: denoiser(x, t), precond).to(THERE)
    one(batch(), level())  # the table is copied once
    with another_device(capturing=True):
        for step in (one(batch(), level()), two(batch(), level(), level()), two.denoise(batch(), level())):
            step.sum().backward()


@pytest.mark.parametrize("name", ["CM", "euler", "backward", "per element"])
def test_a_consistency_models_step_can_be_captured(name: str) -> None:
    student, t = consistency_student(name), level()
    with another_device(capturing=True):
        student(batch(), t)
        student.denoise(batch(), t)
        times = ap.JumpTimes(t, ap.ect_target_times(t), torch.zeros_like(t))
        options: dict[str, Any] = {"share_dropout": False}
        ap.consistency_distillation_loss(None, student, student, batch(), batch(), times, **options).loss.backward()


DRAWN: dict[str, Callable[[], ap.JumpTimes]] = {
    "improved": lambda: ap.sample_ict_times(BATCH, GRID, generator=seeded()),
    "jumps": lambda: ap.sample_jump_times(BATCH, GRID, generator=seeded()),
    "neighbours": lambda: ap.sample_adjacent_times(BATCH, GRID, generator=seeded()),
    "between": lambda: ap.sample_continuous_times(BATCH, generator=seeded()),
}


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("distance", [ap.squared_error, ap.pseudo_huber, ap.pseudo_huber_elementwise])
def test_losses_do_not_wait(drawn: str, distance: Any) -> None:
    student, perfect = trajectory_student("backward"), teacher()
    with another_device():
        for loss in (ap.trajectory_distillation_loss, ap.consistency_distillation_loss):
            loss(perfect, student, student, batch(), batch(), DRAWN[drawn](), distance=distance).loss.backward()


@pytest.mark.parametrize("weighting", list(ap.WEIGHTINGS))
def test_weightings_can_be_captured(weighting: str) -> None:
    student, times = trajectory_student("euler"), ap.JumpTimes(level(), level(), level())
    with another_device(capturing=True):
        options: dict[str, Any] = {"share_dropout": False, "weighting": weighting}
        loss = ap.trajectory_distillation_loss(None, student, student, batch(), batch(), times, **options).loss
        other = ap.denoising_loss(student.denoise, batch(), batch(), level()).loss
        (loss + ap.adaptive_balance(loss, other, student.network.last.weight) * other).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_averages_do_not_wait(when: str, dtype: torch.dtype) -> None:
    """The number of updates stays on the CPU, whether the student or its average is moved."""
    student = ap.ConsistencyTrajectoryModel(Network(2), ap.CTMPreconditioning()).to(dtype)
    if when == "before":
        student = student.to(THERE)
    average = ap.exponential_moving_average(student, 0.9)
    if when == "after":
        average, student = average.to(THERE), student.to(THERE)
    with another_device():
        for _ in range(3):
            average.update_parameters(student)
        average(batch(), level(), level())
    assert average.n_averaged.device.type == "cpu"


SAMPLERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "one step": lambda student: ap.sample_one_step(student, batch()),
    "multistep": lambda student: ap.sample_multistep(student, batch(), GRID[::3], generator=seeded()),
    "own noise": lambda student: ap.sample_multistep(
        student, batch(), GRID[::3], noise=there(2, BATCH, *SHAPE)
    ),
    "per sample": lambda student: ap.sample_multistep(
        student, batch(), [80.0, 5.0], generator=ap.per_sample_generators(BATCH, seeded())
    ),
    "gamma": lambda student: ap.sample_gamma(student, batch(), [80.0, 5.0, SIGMA_MIN], 0.5, generator=seeded()),
    "deterministic": lambda student: ap.sample_deterministic(student, batch(), torch.tensor([0, 3, 9]), grid=GRID),
}  # fmt: skip


@pytest.mark.parametrize("name", ["euler", "backward", "per element", "least squares"])
def test_samplers_do_not_wait(name: str) -> None:
    student = trajectory_student(name)
    for sampler in SAMPLERS.values():
        with another_device():
            assert sampler(student).device == THERE
    outside = [100.0, 1.0]
    if name != "euler":  # the range is known to the host, whatever the device
        with pytest.raises(ValueError, match="levels must lie in the student's range"):
            ap.sample_deterministic(student, batch(), outside)


@pytest.mark.parametrize("own", [seeded(), ap.per_sample_generators(BATCH, seeded())], ids=["one", "each"])
def test_noise_is_copied_once(own: Any) -> None:
    with another_device() as mode:
        noise = ap.draw_noise((BATCH, *SHAPE), own, device=THERE)
    assert noise.shape == (BATCH, *SHAPE)
    assert mode.launches == 1


# teachers, schedules and the ODE


def test_conditions_moved_in_inference_mode_do_not_end_training() -> None:
    """A validation in inference mode, as Lightning's, may be the first call."""
    network = nn.Linear(3, 3).to(THERE)
    denoiser = ap.denoiser_from_network(
        lambda x, time, label: x + network(label), "epsilon", ap.EDMSchedule(), label=torch.zeros(1, 3)
    )
    with torch.inference_mode():
        denoiser(there(BATCH, 3), level())
    denoiser(there(BATCH, 3), level()).sum().backward()
    assert network.weight.grad is not None


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_and_adapters_can_be_captured(schedule: ap.Schedule) -> None:
    """A table is copied at the first call, as a graph's warming up is."""
    schedule.time(level())
    labelled = partial(ap.denoiser_from_network, Network(1), schedule=schedule, class_labels=torch.zeros(1, 3))
    denoisers = [labelled(prediction=kind).to(THERE) for kind in ("epsilon", "v", "sample", "score", "velocity")]
    for denoiser in denoisers:
        denoiser(batch(), level())  # its condition goes along with the first call
    with another_device(capturing=True):
        for function in (schedule.alpha, schedule.sigma, schedule.rates, schedule.noise_level, schedule.network_time):
            function(level())
            function(level()[0])
        for denoiser in denoisers:
            denoiser(batch(), level())
            denoiser(batch(), level(), class_labels=there(BATCH, 3))


def test_a_table_is_copied_once_and_not_into_copies_of_the_schedule() -> None:
    schedule = SCHEDULES["table"]
    schedule.time(level())
    for again in (schedule, copy.deepcopy(schedule)):
        with another_device() as mode:
            again.time(level())
        copied = again is not schedule
        with another_device() as other:
            again.time(level())
        assert (mode.launches > other.launches) == copied


EXACT = {
    "Gaussian": lambda here: ap.GaussianDenoiser(VARIANCES.to(here), 0.5),
    "of a number": lambda here: ap.GaussianDenoiser(1.0, VARIANCES.to(here)),
    "mixture": lambda here: ap.GaussianMixtureDenoiser(torch.ones(3, *SHAPE, device=here), 0.1),
    "empirical": lambda here: ap.EmpiricalDenoiser(torch.ones(4, *SHAPE, device=here)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_denoisers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = EXACT[name]("cpu")
    with another_device():
        denoiser(batch(), level())  # from the CPU, without waiting
    denoiser = denoiser.to(THERE)
    with another_device(capturing=True):
        ap.guide(denoiser, denoiser, 2.0)(batch(), level())
    # made of tensors there, all of it is there; values are not looked at, as there are none
    monkeypatch.setattr("analytic_precond.teachers.exact.check_finite", lambda *_: None)
    monkeypatch.setattr(Tensor, "__bool__", lambda self: False if self.is_meta else bool(self.item()))
    if name != "mixture":  # whose weights must have a positive sum
        assert {buffer.device for buffer in EXACT[name](THERE).buffers()} == {THERE}


def test_the_ode() -> None:
    perfect, x = teacher(), batch()
    labelled = ap.denoiser_from_network(Network(1), "epsilon", SCHEDULES["vp"]).to(THERE)
    start, stop = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([9, 1, 5, 4, 8])
    with another_device():
        for method in ("euler", "heun"):
            ap.solve_ode(perfect, x, GRID, method, trajectory=True)
        ap.heun_solve(perfect, x, GRID, start, stop)
        ap.heun_solve(labelled, x, GRID, start, stop, class_labels=there(BATCH, 3))
        ap.heun_solve_between(perfect, x, level(), level(), torch.tensor([1, 2, 3, 1, 1]))
    with another_device(capturing=True):
        for t, s in ((level(), level()), (5.0, 1.0)):
            ap.probability_flow_velocity(perfect, x, t)
            ap.euler_step(perfect, x, t, s)
            ap.heun_step(perfect, x, t, s)
            ap.heun_solve_between(perfect, x, t, s, 2)


@long  # hundreds of the teacher's steps
@pytest.mark.parametrize("name", ["CM", "backward", "per element", "least squares"])
def test_the_consistency_gap(name: str) -> None:
    perfect, precond = teacher(), moved(name)
    with another_device():
        ap.consistency_gap(perfect, precond, batch(), 5.0, target(name, 1.0))


def test_random_levels() -> None:
    with another_device():
        for draw in (ap.sample_lognormal_noise_levels, ap.sample_karras_noise_levels, ap.sample_continuous_times):
            draw(BATCH, generator=seeded(), device=THERE)


# wrong devices are named


def wrong() -> dict[str, tuple[Callable[[], object], str]]:
    here, precond = torch.ones(BATCH, *SHAPE), copy.deepcopy(preconditionings()["backward"])
    student = ap.ConsistencyTrajectoryModel(Network(2), precond)
    denoiser = ap.denoiser_from_network(Network(1), "epsilon", SCHEDULES["vp"])
    move = r"move the preconditioning by \.to\('meta'\)"
    return {
        "call": (lambda: precond(level(), 1.0), rf"t must be on cpu, as the preconditioning is, got meta: {move}"),
        "target": (lambda: precond(5.0, level()), rf"s must be on cpu, as the preconditioning is, got meta: {move}"),
        "jump": (lambda: precond.jump(batch(), batch(), 5.0, 1.0), rf"t must be on cpu, .*{move}"),
        "data": (
            lambda: moved("backward").jump(here, here, 5.0, 1.0), "x_t must be on meta, as the preconditioning is, got",
        ),
        "output": (lambda: precond.jump(here, batch(), 5.0, 1.0), "denoised must be on cpu, as x_t is, got meta"),
        "student": (
            lambda: student(batch(), 5.0, 1.0), r"network of ConsistencyTrajectoryModel is, got meta: move .*\.to",
        ),
        "denoiser": (lambda: denoiser(batch(), level()), r"x must be on cpu, as the network of NetworkDenoiser is"),
        "noise": (
            lambda: ap.denoising_loss(lambda x, t: x, batch(), here, level()), "noise must be on meta, as x_0 is, got",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["call", "target", "jump", "data", "output", "student", "denoiser", "noise"])
def test_a_wrong_device_is_named(name: str) -> None:
    act, message = wrong()[name]
    with pytest.raises(ValueError, match=message):
        act()


def test_the_advice_works() -> None:
    student = ap.ConsistencyTrajectoryModel(Network(2), copy.deepcopy(preconditionings()["backward"]))
    with pytest.raises(ValueError, match="must be on cpu"):
        student(batch(), 5.0, 1.0)
    assert student.to("meta")(batch(), 5.0, 1.0).device == THERE


# torch's default device


def test_tables_are_made_on_the_cpu_whatever_the_default(tmp_path: Path) -> None:
    """With `torch.set_default_device("cuda")`, as many codes begin, and data and teacher where they are."""
    data = VARIANCES.sqrt() * torch.randn(64, *SHAPE, generator=seeded(), dtype=torch.float64)
    denoiser = ap.GaussianDenoiser(VARIANCES)
    levels = ap.log_noise_levels(8)
    options: dict[str, Any] = {"num_samples": 64, "progress": False, "per_element": True}
    fit: dict[str, Any] = {"num_trajectories": 32, "progress": False}

    def everything() -> list[Tensor]:
        grids = [ap.log_noise_levels(8), ap.karras_noise_levels(8)]
        runs = [ap.estimate_statistics(denoiser, data, levels, seed=seed, **options) for seed in (0, 1)]
        merged = ap.merge_statistics(runs)
        merged.save(tmp_path / "statistics.safetensors")
        loaded = ap.TeacherStatistics.load(tmp_path / "statistics.safetensors")
        made: list[ap.Preconditioning] = [
            ap.AnalyticPreconditioning(loaded),
            ap.PerElementPreconditioning(loaded),
            ap.LeastSquaresPreconditioning.fit(denoiser, data, levels, **fit),
            ap.PerModePreconditioning.fit(denoiser, data, levels, **fit),
        ]
        report = ap.check_teacher(denoiser, data, levels, num_samples=64, progress=False)
        half = torch.tensor([5.0, 1.0], device="cpu")
        return [*grids, merged.l, merged.s_stderr, report.slope.value, *(p(half, 0.1).c_out for p in made)]

    expected = everything()
    with torch.device(THERE):
        got = everything()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs)


# nothing is left out

ELSEWHERE = {
    # types, records, containers and tables of names
    "Denoiser", "Schedule", "Scalings", "DenoiserScalings", "Preconditioning", "NOISE_CONDITIONINGS", "JumpTimes",
    "WEIGHTINGS", "Loss", "ResizeRule", "SamplingStep", "TeacherReport", "ConsistencyGap", "GapMap", "Preset",
    "PRESETS", "preset", "PaperExperiment", "PAPER_EXPERIMENTS", "paper_experiment", "TeacherStatistics",
    "StatisticsHeader", "ElementStatistics", "EMS", "NetworkDenoiser", "TrajectoryAlignment", "Rates",
    "ScheduledPreconditioning", "ict_num_levels",
    # statistics, files, reports and pictures, whose numbers are read: they wait once per batch or for a result
    "estimate_statistics", "merge_statistics", "save_ems", "load_ems", "check_teacher", "gap_map",
    "trajectory_alignment", "plot_statistics", "plot_preconditioning", "plot_gap_map", "initialize_from_teacher",
    # other packages' parts, formulas of two lines, generators' states, a mark
    "LPIPSDistance", "denoiser_from_diffusers", "ConsistencyJumpScheduler", "LCMPreconditioning", "expand_to",
    "SharedDropout", "common", "denoiser_from_edm", "EDMPreconditioning",
}  # fmt: skip


def test_all_names_are_here_or_excused() -> None:
    text = Path(__file__).read_text()
    used = {name for name in ap.__all__ if f"ap.{name}" in text}
    assert set(ap.__all__) - used - ELSEWHERE == set()
    assert ELSEWHERE <= set(ap.__all__)
