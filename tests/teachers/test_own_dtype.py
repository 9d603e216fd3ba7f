"""In what dtype, on which device and behind which callable a network is found."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond._modules import modules_of, network_dtype, tensors_of

F8 = torch.float8_e4m3fn


class Recorder(nn.Module):
    """A network that says which dtypes it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return 0 * x


class Wan(Recorder):
    """Its own first parameter is float32, the layers are bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, 3))
        self.layer = nn.Linear(3, 3, dtype=torch.bfloat16)

    def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
        return super().forward(self.layer(x))


class Diffusers(Recorder):
    """Most elements are float32; the model says what it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(30, 30)
        self.layer = nn.Linear(3, 3, dtype=torch.float16)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16


class Guided(Recorder):
    """guided-diffusion's convention: x is cast to ``dtype`` inside, and back before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float16
        self.time_embed = nn.Linear(3, 3)
        self.blocks = nn.Linear(30, 30, dtype=torch.float16)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
        h = (2 * x.to(self.dtype)).to(x.dtype)
        return super().forward(self.out(h))


class Stored(Recorder):
    """Weights are stored in 8 bits, and cast to x's dtype in each call."""

    def __init__(self, bias: torch.dtype = F8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3).to(F8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(3).to(bias), requires_grad=False)

    def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


CASES: dict[str, tuple[Callable[[], Recorder], torch.dtype]] = {
    "most of its parameters": (Wan, torch.bfloat16),
    "what it says": (Diffusers, torch.float16),
    "what casts by itself": (Guided, torch.float32),
    "nothing but storage": (Stored, torch.float32),
    "storage and others": (lambda: Stored(torch.bfloat16), torch.bfloat16),
    "no parameters": (Recorder, torch.float32),
}
X, T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 1.0])


@pytest.mark.parametrize(("make", "dtype"), CASES.values(), ids=CASES.keys())
def test_everything_calls_a_network_in_its_own_dtype(make: Callable[[], Recorder], dtype: torch.dtype) -> None:
    network = make()
    calls: list[Callable[[], object]] = [
        lambda: ap.ConsistencyTrajectoryModel(network, ap.CTMPreconditioning())(X, T, T / 2),
        lambda: ap.ConsistencyModel(network, ap.CTMPreconditioning())(X, T),
        lambda: ap.denoiser_from_network(network, "epsilon", ap.EDMSchedule())(X, T),
        lambda: ap.heun_step(network, X, T, T / 2),
        lambda: ap.heun_step(ap.denoiser_from_network(network, "epsilon", ap.EDMSchedule()).network, X, T, T / 2),
        lambda: ap.heun_step(partial(network.forward), X, T, T / 2),
        lambda: ap.heun_step(nn.DataParallel(network), X, T, T / 2),
    ]
    for call in calls:
        network.seen.clear()
        call()
        assert set(network.seen) == {dtype}


def test_a_dtype_of_ones_own() -> None:
    for make, own in ((Wan, torch.float32), (Recorder, torch.bfloat16)):
        network: Any = make().to(own)
        ap.denoiser_from_edm(network)(X, T)
        ap.denoiser_from_edm(network, dtype=own)(X, T)
        ap.denoiser_from_edm(network.to(torch.float64), dtype=torch.float64)(X, T)
        assert network.seen == [torch.float32, own, torch.float64]


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("make", [Stored, lambda: Stored(torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_network_stored_in_8_bits_moves_nothing(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    x = torch.full((1, 3), 300.0, dtype=dtype)
    assert torch.equal(ap.heun_step(make(), x, 2.0, 1.0), x)  # D(x) = x; float8 has 288 and 320
    student = ap.ConsistencyModel(make(), ap.CTMPreconditioning())
    assert student(x, 2.0).dtype == dtype


def test_what_is_cast_or_replaced_later_is_noticed() -> None:
    network = Wan()
    student = ap.ConsistencyModel(network, ap.CTMPreconditioning())
    copies = [student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))]
    for one in copies:
        for cast in (one, one.network):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                cast.to(dtype)
                one(X, T)
                assert one.network.seen[-1] == dtype
        one.network = Recorder()
        one(X, T)
        assert one.network.seen == [torch.float32]
    assert network.seen[-1] == torch.bfloat16
    assert len(network.seen) == 6  # the copies have networks of their own

    guided = ap.ConsistencyModel(Guided().float(), ap.CTMPreconditioning())
    guided.network.blocks.half()  # type: ignore[union-attr, operator]
    guided(X, T)
    assert guided.network.seen == [torch.float32]  # type: ignore[union-attr]


@pytest.mark.usefixtures("around")
def test_lazy_parameters_are_no_obstacle() -> None:
    student = ap.ConsistencyModel(Lazy(), ap.CTMPreconditioning())
    assert student(X, T).shape == X.shape


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize(("make", "dtype"), CASES.values(), ids=CASES.keys())
def test_compiles_in_one_graph(make: Callable[[], Recorder], dtype: torch.dtype) -> None:
    class Quiet(nn.Module):  # without a list of what it saw
        def __init__(self) -> None:
            super().__init__()
            for name, part in (*network.named_children(), *network.named_parameters(recurse=False)):
                setattr(self, name, part)

        def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
            return x / 2 if x.dtype == dtype else torch.nan * x

    network: nn.Module = make()
    if isinstance(network, Diffusers):
        Quiet.dtype = network.dtype  # type: ignore[attr-defined]
    network = Quiet()
    student = ap.ConsistencyModel(network, ap.CTMPreconditioning())
    steps: list[Callable[..., Tensor]] = [student, lambda x, t: ap.heun_step(network, x, t, t / 2)]
    torch.compiler.reset()
    for step in steps:
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X, T), step(X, T))
    torch.compiler.reset()


class Model(nn.Module):
    """A model whose denoiser is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(0.5))
        self.seen: list[torch.dtype] = []

    def denoise(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        self.seen.append(x.dtype)
        return 0 * self.dropout(self.layer(x)) + shift


def wrapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return call


BEHIND: dict[str, Callable[[Model], Any]] = {
    "method": lambda model: model.denoise,
    "partial": lambda model: partial(model.denoise, shift=1.0),
    "wrapped": lambda model: wrapped(partial(model.denoise)),
    "adapted": lambda model: ap.denoiser_from_edm(model.denoise),
    "guided": lambda model: ap.guide(partial(model.denoise), model.denoise, 2.0),
    "guided, adapted": lambda model: ap.guide(lambda x, t: 0 * x, ap.denoiser_from_edm(model.denoise), 2.0),
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_the_module_behind_a_function_is_found(behind: Callable[[Model], Any]) -> None:
    model = Model()
    denoiser = behind(model)
    assert set(model.modules()) <= set(modules_of(denoiser))
    assert [id(v) for v in tensors_of(denoiser)] == [id(v) for v in (*model.parameters(), *model.buffers())]
    assert network_dtype(denoiser, torch.float16) == torch.float64
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kwargs: dict[str, Any] = {"levels": torch.tensor([2.0, 1.0]), "num_samples": 8, "progress": False}
    kwargs["s_method"] = "finite-difference"  # for guided ones
    with pytest.warns(UserWarning, match=r"training mode, with Dropout and a dropout of 0\.5"):
        ap.estimate_statistics(denoiser, data, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        ap.estimate_statistics(denoiser, data, **kwargs)
        model.seen.clear()
        ap.heun_step(denoiser, data.float(), 2.0, 1.0)
    assert set(model.seen) == {torch.float64}


def test_a_module_that_holds_its_own_method_is_walked_once() -> None:
    model = Model()
    model.teacher = ap.denoiser_from_edm(model.denoise)
    assert len(modules_of(model)) == len(set(modules_of(model))) == 4
    assert modules_of(lambda x, t: model(x)) == []


def test_the_device_is_that_of_what_is_not_offloaded(tmp_path: Path) -> None:
    class Offloaded(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.offloaded = nn.Linear(3, 3, device=device)
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x / (1 + t[:, None] ** 2)

    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"levels": torch.tensor([2.0, 1.0]), "num_samples": 8, "progress": False}
    expected = ap.estimate_statistics(Offloaded("cpu"), data, **kwargs)
    teacher = Offloaded("meta")
    for options in ({}, {"device": "cpu"}):
        path = tmp_path / f"{len(options)}.safetensors"
        for _ in range(2):  # anew, and from the file
            stats = ap.estimate_statistics(teacher, data, **kwargs, **options, resume=path)  # type: ignore[arg-type]
            assert torch.equal(stats.l, expected.l)
    everything = teacher.to("meta")
    assert torch.equal(ap.estimate_statistics(everything, data, **kwargs, device="cpu").l, expected.l)
    assert torch.equal(ap.estimate_statistics(everything, data, **kwargs).l, expected.l)
    fit = ap.LeastSquaresPreconditioning.fit(everything, data, torch.tensor([2.0, 1.0, 0.5]), 8, progress=False)
    assert fit.sigma_max == 2.0
