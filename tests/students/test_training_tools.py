"""Shared dropout masks, moving averages and the balance of two losses."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from global_rng import global_rng_untouched
from torch import nn
from torch.nn.functional import dropout

import analytic_precond as ap
from analytic_precond.distillation.denoising import adaptive_balance
from analytic_precond.distillation.student_passes import SharedDropout
from analytic_precond.students.averaging import exponential_moving_average

ONES = torch.ones(400)


@pytest.fixture(autouse=True)
def _seeded_global_generator() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_masks_are_shared_and_the_generator_moves_on_by_one_pass() -> None:
    state = torch.get_rng_state()
    expected = [dropout(ONES), dropout(ONES)]
    torch.set_rng_state(state)
    masks = SharedDropout()
    with masks:
        first = dropout(ONES)
    for _ in range(3):
        with masks:
            assert torch.equal(dropout(ONES), first)
            dropout(ONES)  # a longer pass
    assert torch.equal(first, expected[0])
    assert torch.equal(dropout(ONES), expected[1])


def test_masks_differ_between_steps_and_an_exception_restores_the_generator() -> None:
    masks = SharedDropout()
    with masks:
        first = dropout(ONES)
    with SharedDropout():
        assert not torch.equal(dropout(ONES), first)
    state = torch.get_rng_state()
    with pytest.raises(TypeError), masks:
        dropout(dropout(ONES), p="half")  # type: ignore[arg-type]  # after one that worked
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_masks_are_shared_on_every_cuda_device() -> None:
    masks = SharedDropout()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with masks:
        first = [dropout(ONES.to(device)) for device in devices]
    with masks:
        for device, mask in zip(devices, first, strict=True):
            assert torch.equal(dropout(ONES.to(device)), mask)


def test_average_follows_the_recursion_and_resumes() -> None:
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = exponential_moving_average(student, 0.9)
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in student.parameters())

    expected = None
    for step in range(5):
        with torch.no_grad():
            student[0].weight.add_(torch.full((3, 2), step + 1.0))
            student[1].running_mean.fill_(step)
        average.update_parameters(student)
        weight = student[0].weight.detach().double()
        expected = weight.clone() if expected is None else 0.9 * expected + 0.1 * weight
        torch.testing.assert_close(average.module[0].weight.double(), expected, rtol=1e-6, atol=0)  # float32
        assert torch.equal(average.module[1].running_mean, student[1].running_mean)
        if step == 2:
            saved = copy.deepcopy(average.state_dict())
            resumed = exponential_moving_average(student, 0.9)
            resumed.load_state_dict(saved)
        if step > 2:
            resumed.update_parameters(student)
    for name, value in average.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.usefixtures("around")
def test_average_of_a_student_is_called_as_the_student_and_keeps_its_tables() -> None:
    levels = ap.log_noise_levels(16)
    precond = ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + levels**2), 0 * levels)
    student = ap.ConsistencyTrajectoryModel(_Network(), precond)
    average = exponential_moving_average(student, 0.5)
    average.update_parameters(student)
    x = torch.ones(3, 2)
    assert torch.equal(average(x, 5.0, 1.0), student(x, 5.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(average.module.precond.buffers(), precond.buffers(), strict=True))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, c_t: torch.Tensor, c_s: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("dtype", "goal", "decay", "steps", "expected"),
    [(torch.bfloat16, 2.0, 0.999, 5000, 1.9933), (torch.float16, 1.5, 0.999, 3000, 1.4751)],
)
def test_narrow_weights_are_averaged_in_float32(
    dtype: torch.dtype, goal: float, decay: float, steps: int, expected: float
) -> None:
    student = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(student.weight)
    average = exponential_moving_average(student, decay)
    average.update_parameters(student)
    nn.init.constant_(student.weight, goal)
    for _ in range(steps):
        average.update_parameters(student)
    assert average.module.weight.dtype == average(torch.ones(1, 1, dtype=dtype)).dtype == dtype
    exact = goal - (goal - 1) * decay**steps
    assert exact == pytest.approx(expected, abs=5e-5)
    mean = average.state_dict()["means.weight"]
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(exact, rel=steps * 6e-8)  # float32 rounds once a step
    assert average.module.weight.item() == torch.tensor(mean.item(), dtype=dtype).item()


class _Mixed(nn.Module):
    """Weights of several dtypes, one of them tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3).bfloat16()
        self.head = nn.Linear(3, 3)
        self.tied = self.body
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))


def _moved(student: nn.Module, step: int) -> nn.Module:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) if p.is_floating_point() else p + 1)
    return student


def _same(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_average_of_several_dtypes_follows_the_recursion() -> None:
    student = _Mixed()
    average, expected = exponential_moving_average(student, 0.9), {}
    for step in range(6):
        student.seen.fill_(step)
        average.update_parameters(_moved(student, step))
        for name, p in student.named_parameters():
            value = p.detach().clone().double()
            expected[name] = value if step == 0 or name == "codes" else 0.9 * expected[name] + 0.1 * value
    for name, p in average.module.named_parameters():
        # rounding of bfloat16 once, of float32 in six steps, of float64
        tolerance = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}.get(p.dtype, 0)
        torch.testing.assert_close(p.double(), expected[name], rtol=tolerance, atol=tolerance * 0.1)
    assert torch.equal(average.module.seen, student.seen)
    assert sorted(name for name in average.state_dict() if name.startswith("means")) == [
        "means.body/bias",
        "means.body/weight",
    ]
    assert not [p for p in average.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda average: pickle.loads(pickle.dumps(average)),
        lambda average: _loaded(average, lambda file: torch.load(file, weights_only=True)),
        lambda average: _loaded(average, lambda file: torch.load(file, weights_only=True, mmap=True)),
    ],
    ids=["deepcopy", "pickle", "state_dict", "mapped state_dict"],
)
def test_average_goes_on_exactly(copied: Callable[[nn.Module], nn.Module]) -> None:
    student = _Mixed()
    average = exponential_moving_average(student, 0.99)
    for step in range(3):
        average.update_parameters(_moved(student, step))
    other = copied(average)
    _same(other, average)
    for step in range(3, 6):
        average.update_parameters(_moved(student, step))
        other.update_parameters(student)
    assert other.n_averaged == 6
    _same(other, average)


def _loaded(average: nn.Module, load: Callable[[str], Any]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(average.state_dict(), f"{folder}/average.pt")
        resumed = exponential_moving_average(_Mixed(), 0.99)
        resumed.load_state_dict(load(f"{folder}/average.pt"))
    return resumed


def test_average_of_torch_is_gone_on_with() -> None:
    student = nn.Linear(2, 2).bfloat16()
    theirs = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(student)
    ours = exponential_moving_average(_moved(nn.Linear(2, 2).bfloat16(), 1), 0.9)
    ours.load_state_dict(theirs.state_dict())
    assert ours.n_averaged == 1
    assert torch.equal(ours.means.weight, student.weight.float())


def test_casting_the_average_loses_nothing() -> None:
    student = nn.Linear(2, 2)
    averages = [exponential_moving_average(student, 0.9) for _ in range(3)]
    averages[1].bfloat16()
    averages[2].half()
    for step in range(4):
        _moved(student, step)
        for average in averages:
            average.update_parameters(student)
    wide, *narrow = averages
    for average, dtype in zip(narrow, (torch.bfloat16, torch.float16), strict=True):
        assert average(torch.ones(1, 2, dtype=dtype)).dtype == dtype
        assert torch.equal(average.means.weight, wide.module.weight)
        assert torch.equal(average.module.weight, wide.module.weight.to(dtype))
        average.float()
        assert torch.equal(average.module.weight, wide.module.weight)
        assert "means.weight" not in average.state_dict()


def test_average_is_made_without_memory_too() -> None:
    with torch.device("meta"):
        empty = exponential_moving_average(nn.Linear(2, 2).bfloat16(), 0.9)
    student = nn.Linear(2, 2).bfloat16()
    average = exponential_moving_average(student, 0.9)
    average.update_parameters(student)
    empty.to_empty(device="cpu").load_state_dict(average.state_dict())
    assert empty.n_averaged.device.type == "cpu"
    for other in (empty, average):
        other.update_parameters(student)
    _same(empty, average)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("root", [False, True], ids=["average.module", "average"])
def test_average_made_before_sharding(dtype: torch.dtype, root: bool) -> None:
    fully_shard = pytest.importorskip("torch.distributed.fsdp").__dict__.get("fully_shard")
    if fully_shard is None:
        pytest.skip("FSDP2 is public since torch 2.6")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))

    def shard(network: nn.Module) -> nn.Module:
        return fully_shard(network, mesh=mesh)

    def make() -> tuple[nn.Module, nn.Module]:
        student = _moved(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).to(dtype), 0)
        average = exponential_moving_average(student, 0.9)
        shard(average if root else average.module)
        return shard(student), average

    plain = _moved(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).to(dtype), 0)
    expected = exponential_moving_average(plain, 0.9)
    (student, average), (_, resumed) = make(), make()
    x = torch.ones(2, 3, dtype=dtype)
    for step in range(6):
        with torch.no_grad():
            for p, value in zip(student.parameters(), _moved(plain, step).parameters(), strict=True):
                p.copy_(torch.distributed.tensor.distribute_tensor(value.detach(), mesh, p.placements))
        for each, source in (expected, plain), (average, student), *([(resumed, student)] if step > 3 else []):
            each.update_parameters(source)
            with torch.no_grad():
                assert torch.equal(each(x), expected(x))  # after which FSDP2's root is left gathered
        if step == 3:
            resumed.load_state_dict(average.state_dict())
    for each in (average, resumed):
        for name, value in each.state_dict().items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(whole, expected.state_dict()[name]), name

    with pytest.raises(TypeError, match=r"make the average before fully_shard, and shard average\.module"):
        exponential_moving_average(student, 0.9)
    with pytest.raises(ValueError, match=r"others by shape or sharding.*under FSDP2, shard average\.module like it"):
        exponential_moving_average(plain, 0.9).update_parameters(student)


def test_average_refuses_what_it_cannot_average() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        exponential_moving_average(lambda x: x, 0.9)  # type: ignore[arg-type]
    for decay in (-0.1, 1.1, True, "0.9", float("nan")):
        with pytest.raises(ValueError, match="decay must be a number in"):
            exponential_moving_average(nn.Linear(1, 1), decay)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="student must have the weights that are averaged, got others by shape"):
        exponential_moving_average(nn.Linear(1, 1), 0.9).update_parameters(nn.Linear(1, 2))
    with pytest.raises(ValueError, match="got others"):  # of which the first fit
        exponential_moving_average(nn.Linear(1, 1, bias=False), 0.9).update_parameters(nn.Linear(1, 1))
    student = nn.Linear(1, 1)
    student.result = 2 * student.weight
    with pytest.raises(TypeError, match=r"must be a module that can be copied, got Linear.*explicitly by the user"):
        exponential_moving_average(student, 0.9)


def test_balance_is_the_ratio_of_gradient_norms() -> None:
    phi = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference, other = (phi**2).sum(), 3 * phi[0] + 4 * phi[1]
    weight = adaptive_balance(reference, other, phi)
    # gradients (2, 4) and (3, 4); the floor 1e-4 is the rule's own
    assert weight.item() == pytest.approx(math.sqrt(20) / (5 + 1e-4), rel=1e-12)
    assert not weight.requires_grad
    (reference + weight * other).backward()  # both graphs are still there
    torch.testing.assert_close(phi.grad, torch.tensor([2 + 3 * weight, 4 + 4 * weight], dtype=torch.float64))


def test_balance_is_bounded() -> None:
    phi = torch.ones(1, requires_grad=True)
    assert adaptive_balance(1e6 * phi.sum(), 0 * phi.sum(), phi).item() == 1e4
    assert adaptive_balance(0 * phi.sum(), phi.sum(), phi).item() == 0.0


def test_balance_refuses_losses_without_a_gradient() -> None:
    phi = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"reference must be a scalar tensor, got dict: pass the \.loss of a Loss"):
        adaptive_balance({}, phi.sum(), phi)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"other must be a scalar loss, got shape \(2,\)"):
        adaptive_balance(phi.sum(), phi, phi)
    for other in (torch.ones(1, requires_grad=True).sum(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="other must depend on the parameter"):
            adaptive_balance(phi.sum(), other, phi)


def test_nothing_touches_the_global_generators() -> None:
    with global_rng_untouched():
        student = nn.utils.skip_init(nn.Linear, 1, 1)
        nn.init.ones_(student.weight)
        nn.init.ones_(student.bias)
        exponential_moving_average(student, 0.9).update_parameters(student)
        adaptive_balance(student.weight.sum(), student.weight.sum(), student.weight)
        masks = SharedDropout()
        for _ in range(2):
            with masks:
                pass
