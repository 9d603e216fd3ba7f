"""Students against golden outputs of reference code, and in the company that training codes keep."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from checkout import GOLDEN as GOLDEN_FILE
from constructions import raw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import analytic_precond as ap

pytestmark = pytest.mark.usefixtures("around")

GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_FILE).items()}
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]


def tau(t: Tensor) -> Tensor:
    return 250 * (t + 1e-44).log()


def golden_network(x: Tensor, tau: Tensor, tau_s: Tensor | None = None) -> Tensor:
    """The closed form that the reference codes were run with."""
    out = torch.sin(1.3 * x + 0.002 * ap.expand_to(tau, x)) + 0.25 * x
    return out if tau_s is None else out + 0.1 * torch.cos(0.003 * ap.expand_to(tau_s, x) + x)


def test_trajectory_model_agrees_with_sony_ctm() -> None:
    student = ap.ConsistencyTrajectoryModel(golden_network, ap.CTMPreconditioning(), noise_conditioning=tau)
    torch.testing.assert_close(student(X, T, S), GOLDEN["sony_edm_euler_jump"], rtol=1e-11, atol=1e-11)


def test_consistency_model_agrees_with_an_edm_jump_by_hand() -> None:
    model = ap.ConsistencyModel(golden_network, ap.CTMPreconditioning(), noise_conditioning=tau)
    t = T.clamp(min=0.01)
    edm = ap.EDMPreconditioning()(t)
    c_skip, c_out, c_in = (ap.expand_to(c, X) for c in edm[:3])
    D = c_skip * X + c_out * golden_network(c_in * X, tau(t))
    ratio = ap.expand_to(0.002 / t, X)
    torch.testing.assert_close(model(X, t), ratio * X + (1 - ratio) * D, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.denoise(X, t), D, rtol=1e-12, atol=1e-12)


class Network(nn.Module):
    """A small convolutional network of two noise levels and a label."""

    def __init__(self, two_times: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed_t = nn.Linear(1, 8)
        if two_times:
            self.embed_s = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.label = nn.Embedding(10, 8)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, c_t: Tensor, c_s: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        dtype = self.enter.weight.dtype
        embedding = self.embed_t(c_t[:, None].to(dtype))
        if c_s is not None:
            embedding = embedding + self.embed_s(c_s[:, None].to(dtype))
        if label is not None:
            embedding = embedding + self.label(label)
        h = self.enter(x) + embedding[:, :, None, None]
        return checkpoint(self.body, h, use_reentrant=False) if self.checkpointed else self.body(h)


def analytic() -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), torch.tanh(levels.log()))


def make(**kwargs: bool) -> ap.ConsistencyTrajectoryModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ap.ConsistencyTrajectoryModel(Network(**kwargs), analytic())


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    t = torch.linspace(0.1, 70.0, size)
    x = t[:, None, None, None] * torch.randn(size, 3, 8, 8, generator=generator)
    return x.to(dtype), t, t / torch.linspace(1.0, 3.0, size)


def test_boundary_and_read_out() -> None:
    student = make().double()
    x, t, _ = batch(dtype=torch.float64)
    t = t.double()
    assert torch.equal(student(x, t, t), x)
    slope = torch.func.jvp(lambda s: student(x, t, s), (t,), (torch.ones_like(t),))[1]
    read_out = x - ap.expand_to(t, x) * slope
    # c_out's slope is right to 1e-11, against x up to 200
    torch.testing.assert_close(read_out, student.denoise(x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_coefficients(autocast: torch.dtype) -> None:
    student = make()
    x, t, s = batch()
    with torch.autocast("cpu", autocast):
        jumped = student(x, t, s)
        assert torch.equal(student(x, t, t), x)  # c_skip = 1 and c_out = 0, nothing rounded
    assert jumped.dtype == torch.float32
    # the network's share is rounded at autocast's precision, of an output of order c_out_edm <= 0.5
    torch.testing.assert_close(jumped, student(x, t, s), rtol=0, atol=2 * torch.finfo(autocast).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network(dtype: torch.dtype) -> None:
    student, x_t_s = make(), batch()
    before = student(*x_t_s)
    after = student.to(dtype)(*x_t_s)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0, atol=4 * torch.finfo(dtype).eps)
    x, t, _ = x_t_s
    assert torch.equal(student(x.to(dtype), t, t), x.to(dtype))


def test_conditions_reach_the_network() -> None:
    student, (x, t, s) = make(), batch()
    labels = torch.tensor([0, 1, 2, 3])
    edm = ap.EDMPreconditioning()(t)
    by_hand = raw(student)(*(v for v in (ap.expand_to(edm.c_in, x) * x, t.log() / 4, s.log() / 4)), label=labels)
    D = ap.expand_to(edm.c_skip, x) * x + ap.expand_to(edm.c_out, x) * by_hand
    torch.testing.assert_close(student(x, t, s, label=labels), student.precond.jump(x, D, t, s))
    assert not torch.equal(student(x, t, s, label=labels), student(x, t, s))


def test_levels_may_be_common_or_shaped() -> None:
    student, (x, _, _) = make(), batch()
    t, s = torch.full((4,), 5.0), torch.full((4,), 1.0)
    expected = student(x, t, s)
    torch.testing.assert_close(student(x, 5.0, 1.0), expected)
    torch.testing.assert_close(student(x, torch.tensor(5.0), torch.tensor([1.0])), expected)
    shaped = (t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(student(x, *shaped), expected)


def test_starts_as_its_teacher() -> None:
    teacher_network = Network(two_times=False)
    student = make()
    report = ap.initialize_from_teacher(raw(student), teacher_network, zero=["embed_s.2"])
    assert report.zeroed == ["embed_s.2.weight", "embed_s.2.bias"]
    assert report.kept == ["embed_s.0.weight", "embed_s.0.bias"]
    assert not report.unused
    teacher = ap.ConsistencyModel(teacher_network, ap.CTMPreconditioning())
    x, t, s = batch()
    assert torch.equal(student._denoiser(x, t, s), teacher._denoiser(x, t))
    assert torch.equal(student.denoise(x, t), teacher.denoise(x, t))
    student(x, t, s).square().mean().backward()
    assert raw(student).embed_s[2].weight.grad.abs().max() > 0  # it can learn from there


def test_initialization_refuses_and_changes_nothing() -> None:
    network, before = Network(), copy.deepcopy(Network().state_dict())
    network.load_state_dict(before)
    for teacher, zero, message in (
        (nn.Linear(7, 7), [], "none in common"),
        (Network(two_times=False), ["embed_u"], "'embed_u' has no parameters"),
        (Network(two_times=False), ["embed_t"], "'embed_t' is also the teacher's"),
    ):
        with pytest.raises(ValueError, match=message):
            ap.initialize_from_teacher(network, teacher, zero)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, x, t: s(x, t), TypeError, r"target noise level s, got none"),
        (lambda s, x, t: s(x, t, 2 * t), ValueError, r"s <= t"),
        (lambda s, x, t: s(x, t, 1e-4 * t), ValueError, r"0\.002 <= s"),
        (lambda s, x, t: s(x, t[:2], t[:2]), ValueError, r"one noise level per sample"),
        (lambda s, x, t: s(x, t.long(), t), TypeError, r"floating-point"),
        (lambda s, x, t: s(x, t, t, labels=t), TypeError, r"labels"),
        (lambda s, x, t: s.denoise(x, float("nan")), ValueError, r"t must be finite and at least 0, got nan"),
        (lambda s, x, t: ap.ConsistencyModel(s.network, s.precond).denoise(x, float("inf")), ValueError,
         r"t must be finite and at least 0, got inf"),
        (lambda s, x, t: ap.ConsistencyTrajectoryModel(lambda x, *_: x[:, :1], s.precond)(x, t, t), ValueError,
         r"network must return x's shape \(4, 3, 8, 8\), got \(4, 1, 8, 8\)"),
        (lambda s, x, t: ap.ConsistencyTrajectoryModel(s.network, "ctm"), TypeError, r"got str"),
        (lambda s, x, t: ap.ConsistencyModel(3, s.precond), TypeError, r"got int"),
        (lambda s, x, t: ap.ConsistencyModel(s.network, s.precond, sigma_min=-0.1), ValueError, r"sigma_min"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[..., object], error: type[Exception], message: str) -> None:
    x, t, _ = batch()
    with pytest.raises(error, match=message):
        call(make(), x, t)


@pytest.mark.parametrize("precond", [ap.CTMPreconditioning(), ap.CMPreconditioning(), analytic()])
def test_consistency_model_takes_the_target_that_it_has(precond: ap.Preconditioning) -> None:
    model = ap.ConsistencyModel(Network(two_times=False), precond)
    x, t, s = *batch()[:2], torch.full((4,), 0.002)
    expected = model(x, t)
    for target in (s, s[0], 0.002, s.double(), torch.tensor([0.0019999996])):  # what float32 grids end with
        torch.testing.assert_close(model(x, t, target), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(x, s, s), x)

    calls: list[Tensor] = []
    model = ap.ConsistencyModel(lambda x, c_t: calls.append(x), precond)
    for other in (s.clone().index_fill_(0, torch.tensor(2), 0.003), 0.0, t):
        with pytest.raises(ValueError, match=r"s must be sigma_min = 0\.002, .* got .*: leave s out"):
            model(x, t, other)
    # to rounding sigma_min in float64, not in float32, which the level is in
    near, beside = ap.ConsistencyModel(model.network, precond, sigma_min=0.0292), torch.full((4,), 0.02919997088611126)
    with pytest.raises(ValueError, match=r"s must be sigma_min = 0\.0292, .* got 0\.0291999709: leave s out"):
        near(x, t, beside)
    with pytest.raises(TypeError, match=r"got 1 \(int\): write 80\.0"):
        model(x, t, 1)
    with pytest.raises(ValueError, match=r"one noise level per sample"):
        model(x, t, s[:2])
    assert not calls


def test_consistency_model_gives_nan_where_values_are_not_read() -> None:
    torch._dynamo.reset()
    model = ap.ConsistencyModel(lambda x, c_t: 0 * x, ap.CTMPreconditioning())
    x, t, s = *batch()[:2], torch.tensor([0.002, 0.003, 0.002, 0.0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x, t, s)
    mapped = torch.vmap(lambda x, t, s: model(x[None], t[None], s[None])[0])(x, t, s)
    for result in (compiled, mapped):
        assert result.flatten(1).isnan().all(1).tolist() == [False, True, False, True]
        torch.testing.assert_close(result[::2], model(x, t)[::2])


def gradients(student: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    student.zero_grad()
    student(*args).square().mean().backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


def test_gradient_checkpointing_and_channels_last() -> None:
    args = batch()
    plain = gradients(make(), args)
    for student, inputs in (
        (make(checkpointed=True), args),
        (
            make().to(memory_format=torch.channels_last),
            (args[0].contiguous(memory_format=torch.channels_last), *args[1:]),
        ),
    ):
        for a, b in zip(plain, gradients(student, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())  # order of float32 sums


def test_state_dict_and_average_keep_the_coefficients() -> None:
    student, args = make(), batch()
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    file.seek(0)
    levels = torch.tensor([10.0, 0.1])
    placeholder = ap.AnalyticPreconditioning.from_coefficients(levels, 0 * levels, 0 * levels)
    restored = ap.ConsistencyTrajectoryModel(Network(), placeholder)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(*args), student(*args))

    average = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    average.update_parameters(student)
    average.update_parameters(student)
    assert torch.equal(average.module.precond(5.0, 1.0).c_out, student.precond(5.0, 1.0).c_out)


def test_compiles_whole_and_not_again_for_each_batch() -> None:
    student = make()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(student, fullgraph=True, backend=counter)
    for size in (4, 6, 8, 5, 12):  # from 16 on torch's own convolution is another graph
        args = batch(size)
        assert torch.equal(compiled(*args), student(*args))
    assert counter.frame_count <= 2  # one for the first batch, one with a dynamic batch size


def test_exports_with_a_dynamic_batch() -> None:
    student, size = make(), torch.export.Dim("size", min=2, max=1024)
    program = torch.export.export(student, batch(), dynamic_shapes={"x_t": {0: size}, "t": {0: size}, "s": {0: size}})
    args = batch(7)
    torch.testing.assert_close(program.module()(*args), student(*args))


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_and_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    args = batch()
    plain = gradients(make(), args)
    for student in (
        nn.parallel.DistributedDataParallel(make(), find_unused_parameters=True),
        fully_shard(make(), mesh=init_device_mesh("cpu", (1,))),
    ):
        sharded = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(student, args)]
        sharded = [g for g in sharded if g.abs().max() > 0]
        for a, b in zip(plain, sharded, strict=True):
            torch.testing.assert_close(a, b)
        precond = student.module.precond if hasattr(student, "module") else student.precond
        assert torch.equal(precond(5.0, 1.0).c_out, analytic()(5.0, 1.0).c_out)
