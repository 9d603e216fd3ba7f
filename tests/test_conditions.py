"""Which of a condition belongs to samples: the one rule over all containers, and everything that asks it."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond._conditions import Common, collated, expanded, on_device, plain, rows_of

B = 3
INDEX = torch.tensor([2, 0, 2, 1])
ROWS = torch.tensor([[0.0], [1.0], [2.0]])  # sample i holds i
TABLE = torch.arange(4.0)


class Named(NamedTuple):
    rows: Any
    table: Any


@dataclass(frozen=True)
class Frozen:
    rows: Any
    table: Any


@dataclass(slots=True)
class Slotted:
    rows: Any
    table: Any = None


@dataclass
class ModelOutput(OrderedDict[str, Any]):  # as in diffusers and transformers: fields are items too
    rows: Any = None
    table: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        make, _, *rest = super().__reduce__()
        return make, tuple(getattr(self, field.name) for field in fields(self)), *rest


class Prompts(list[Any]):
    """A list with a constructor of its own."""

    def __init__(self, *entries: Any) -> None:
        super().__init__(entries)


def default(rows: Any, table: Any) -> Any:
    return defaultdict(list, rows=rows, table=table)


CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "dict": (lambda a, b: {"rows": a, "table": b}, lambda c: (c["rows"], c["table"])),
    "OrderedDict": (lambda a, b: OrderedDict(rows=a, table=b), lambda c: (c["rows"], c["table"])),
    "defaultdict": (default, lambda c: (c["rows"], c["table"])),
    "UserDict": (lambda a, b: UserDict(rows=a, table=b), lambda c: (c["rows"], c["table"])),
    "MappingProxyType": (lambda a, b: MappingProxyType({"rows": a, "table": b}), lambda c: (c["rows"], c["table"])),
    "ModelOutput": (ModelOutput, lambda c: (c.rows, c["table"])),
    "list": (lambda a, b: [a, b], tuple),
    "list subclass": (Prompts, tuple),
    "tuple": (lambda a, b: (a, b), tuple),
    "NamedTuple": (Named, lambda c: (c.rows, c.table)),
    "frozen dataclass": (Frozen, lambda c: (c.rows, c.table)),
    "dataclass with slots": (Slotted, lambda c: (c.rows, c.table)),
    "nested": (
        lambda a, b: {"in": [Named({"rows": a}, (b, None)), None]},
        lambda c: (c["in"][0].rows["rows"], c["in"][0][1][0]),
    ),
}
SAMPLES: dict[str, Any] = {
    "tensor": ROWS,
    "array": ROWS.numpy(),
    "strings": ["0", "1", "2"],
    "numbers": [0, 1, 2],
    "objects": [{"i": 0}, {"i": 1}, {"i": 2}],
    "tokens": [torch.full((n, 2), float(i)) for i, n in enumerate((7, 3, 5))],  # one prompt has B of them
    "sizes": [(0, 9), (1, 9), (2, 9)],
}


def numbers(samples: Any) -> list[int]:
    """Return which samples these are."""

    def number(entry: Any) -> int:
        if isinstance(entry, dict):
            return entry["i"]
        if isinstance(entry, Tensor | np.ndarray):
            entry = entry.flatten().tolist()
        return int(entry[0] if isinstance(entry, list | tuple) else entry)

    return [number(entry) for entry in samples]


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
@pytest.mark.parametrize(("make", "parts"), CONTAINERS.values(), ids=CONTAINERS.keys())
class TestContainers:
    def test_samples_are_taken_and_the_rest_is_not(self, make: Any, parts: Any, samples: Any) -> None:
        condition = make(samples, TABLE)
        taken = rows_of(condition, INDEX, B)
        assert type(taken) is type(condition)
        rows, table = parts(taken)
        assert type(rows) is type(samples)
        assert numbers(rows) == INDEX.tolist()
        assert table is TABLE
        assert numbers(parts(condition)[0]) == [0, 1, 2]  # the caller's own stays

    def test_marks_keep_samples_out_and_come_off(self, make: Any, parts: Any, samples: Any) -> None:
        marked = make(ap.common(samples), TABLE)
        for bare in (rows_of(marked, INDEX, B), plain(marked), expanded(marked, B)):
            assert type(bare) is type(marked)
            assert parts(bare)[0] is samples
        moved, table = parts(on_device(marked, torch.device("meta")))
        assert type(moved) is Common
        assert table.device.type == "meta"

    def test_what_one_sample_holds_is_repeated(self, make: Any, parts: Any, samples: Any) -> None:
        built = make(samples[1:2], TABLE)
        rows, table = parts(expanded(built, 4))
        assert numbers(rows) == [1] * 4
        assert table is TABLE


def test_what_nothing_changes_in_is_itself() -> None:
    """Containers, too: their types may do what they like."""
    for value in (TABLE, "a", 2.0, None, {}, [], (), torch.Size([3, 4]), {"a": [(1, 2)]}, Frozen(1, [TABLE]), range(3)):
        assert rows_of(value, INDEX, B) is value
        assert plain(value) is value
        assert on_device(value, torch.device("cpu")) is value


class TestRule:
    def test_a_tuple_is_structure(self) -> None:
        for value in ((0, 1, 2), ("a", "b", "c"), tuple(torch.ones(5, 2) for _ in range(B)), torch.Size([1, 2, 3])):
            assert rows_of(value, INDEX, B) is value

    def test_a_list_of_batches_is_structure(self) -> None:
        """As many text encoders as samples; or one of them nested, or its entries marked."""
        for make in (lambda rows: rows, lambda rows: {"embeds": rows}, lambda rows: (rows, "name")):
            taken = rows_of([make(ROWS), make(10 + ROWS), make(20 + ROWS)], INDEX, B)
            inner = [
                next(iter(e.values())) if isinstance(e, dict) else e[0] if isinstance(e, tuple) else e for e in taken
            ]
            assert [numbers(rows) for rows in inner] == [[2, 0, 2, 1], [12, 10, 12, 11], [22, 20, 22, 21]]
        assert rows_of([ROWS, "name", 2.0], INDEX, B)[1:] == ["name", 2.0]
        assert rows_of([ap.common(1), 2, 3], INDEX, B) == [1, 2, 3]

    def test_marks_may_be_nested(self) -> None:
        marked = ap.common({"a": ap.common(ROWS), "b": [ap.common("c")]})
        assert plain(marked) == {"a": ROWS, "b": ["c"]}

    def test_dimensions_of_a_single_sample(self) -> None:
        taken = rows_of({"rows": ROWS[1:2], "names": ["b"], "scale": torch.tensor(2.0)}, torch.tensor([0, 0]), 1)
        assert taken["rows"].tolist() == [[1.0], [1.0]]
        assert taken["names"] == ["b", "b"]
        assert taken["scale"].ndim == 0

    def test_no_samples(self) -> None:
        taken = rows_of({"rows": ROWS[:0], "names": []}, torch.arange(0), 0)
        assert taken["rows"].shape == (0, 1)
        assert taken["names"] == []

    def test_moves_whatever_is_inside(self) -> None:
        nested = {"a": [Frozen(ROWS, ap.common((TABLE,)))], "b": np.ones(3)}
        moved = on_device(nested, torch.device("meta"))
        assert moved["a"][0].rows.device.type == moved["a"][0].table.value[0].device.type == "meta"
        assert moved["b"] is nested["b"]

    def test_what_torch_collates(self) -> None:
        samples = [(i, (f"{i}", f"url {i}", {"name": str(i)})) for i in range(B)]
        batch = torch.utils.data.default_collate(samples)
        taken = rows_of(collated(tuple(batch[1:]), B), INDEX, B)[0]
        assert taken[0] == taken[2]["name"] == ["2", "0", "2", "1"]
        assert taken[1] == ["url 2", "url 0", "url 2", "url 1"]
        tokens = collated((tuple(SAMPLES["tokens"]), (1, 2, 3)), B)
        assert rows_of(tokens, INDEX, B)[1] == (1, 2, 3)
        assert numbers(rows_of(tokens, INDEX, B)[0]) == INDEX.tolist()


LEVELS = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)


def gaussian(x: Tensor, t: Tensor, factor: Any = 1.0) -> Tensor:
    return 0.25 / (0.25 + ap.expand_to(t, x) ** 2) * x * factor


class TestEstimates:
    data = 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 64, "auto"])
    def test_a_tuple_of_two(self, batch_size: Any) -> None:
        """The issue's: cut, it gives l = 0.041, 0.140, 0.350."""

        def teacher(x: Tensor, t: Tensor, size: Any) -> Tensor:
            assert size == (2, 1)
            return gaussian(x, t, size[0] / 2)

        batches = [(x, 0) for x in self.data.split(2)]
        options = {"levels": LEVELS, "num_samples": 128, "batch_size": batch_size, "progress": False}
        stats = ap.estimate_statistics(teacher, batches, condition=lambda _: {"size": (2, 1)}, **options)
        torch.testing.assert_close(stats.l, 0.25 / (0.25 + LEVELS**2), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("l_method", ["stein", "hutchinson", "exact"])
    def test_rotary_tables(self, l_method: str) -> None:
        def teacher(x: Tensor, t: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
            assert rotary[0].tolist() == cos.tolist()
            assert rotary[1].tolist() == sin.tolist()
            return gaussian(x, t)

        cos, sin = torch.arange(5.0).cos(), torch.arange(5.0).sin()
        ap.estimate_statistics(
            teacher, [(x, 0) for x in self.data.split(2)], LEVELS, 16, 2, l_method, progress=False,
            condition=lambda _: {"rotary": (cos, sin)},
        )  # fmt: skip

    def test_a_table_as_long_as_the_batch(self) -> None:
        seen = []

        def teacher(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
            seen.append(table.tolist())
            return gaussian(x, t)

        condition = lambda _: {"table": ap.common(TABLE)}  # noqa: E731
        data = [(x, 0) for x in self.data.split(4)]
        ap.estimate_statistics(teacher, data, LEVELS, 16, 4, progress=False, condition=condition)
        ap.LeastSquaresPreconditioning.fit(teacher, data, LEVELS, 8, batch_size=3, progress=False, condition=condition)
        ap.check_teacher(teacher, data, LEVELS, 32, 4, progress=False, condition=condition)
        assert all(table == TABLE.tolist() for table in seen)

    @pytest.mark.parametrize("kind", ["NamedTuple", "frozen dataclass", "UserDict", "MappingProxyType", "ModelOutput"])
    def test_what_a_loader_adds(self, kind: str) -> None:
        """Cut where x is: batches of five become two, two and one."""
        make, parts = CONTAINERS[kind]
        numbered = torch.arange(20.0)[:, None].expand(-1, 4) * 100

        def teacher(x: Tensor, t: Tensor, label: Tensor, names: list[str]) -> Tensor:
            assert (x[:, 0] / 100).round().tolist() == label.tolist() == [float(name) for name in names]
            return gaussian(x, t)

        def condition(extra: Any) -> dict[str, Any]:
            label, names = parts(extra)
            return {"label": label, "names": names}

        batches = [(x, make(x[:, 0] / 100, [str(i) for i in (x[:, 0] / 100).tolist()])) for x in numbered.split(5)]
        ap.estimate_statistics(teacher, batches, LEVELS / 10, 40, 2, progress=False, condition=condition)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"table": TABLE}, r"condition\['table'\]"),
        ({"a": {"b": (None, TABLE.numpy())}}, r"condition\['a'\]\['b'\]\[1\]"),
        ({"layers": [3, 5, 7, 9]}, r"condition\['layers'\]"),
    ],
)
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)])
def test_what_is_the_samples_in_some_batches_only(told: dict[str, Any], name: str, sizes: tuple[int, int]) -> None:
    """Cut in batches of four and whole in one of two: which was meant?"""
    data = [(torch.ones(size, 4), 0) for size in sizes]
    teacher = lambda x, t, **told: gaussian(x, t)  # noqa: E731
    options: dict[str, Any] = {"batch_size": 4, "progress": False, "condition": lambda _: told}
    with pytest.raises(ValueError, match=name + r" must hold one entry for each .* got 4 entries .*ap\.common"):
        ap.estimate_statistics(teacher, data, LEVELS, 12, **options)
    with pytest.raises(ValueError, match=name):
        ap.LeastSquaresPreconditioning.fit(teacher, data, LEVELS, 6, **options)
    marked = {"condition": lambda _: {key: ap.common(value) for key, value in told.items()}}
    ap.estimate_statistics(teacher, data, LEVELS, 12, **options | marked)


def test_a_condition_function_gets_no_marks() -> None:
    seen = []
    data = [(torch.ones(2, 4), ap.common([7, 8]))]
    ap.estimate_statistics(
        gaussian, data, LEVELS, 4, 1, progress=False, condition=lambda extra: seen.append(extra) or {}
    )
    assert seen
    assert all(extra == [7, 8] for extra in seen)


class TestSolutions:
    def test_a_nested_condition_stays_with_its_sample(self) -> None:
        """The issue's: the first call asks samples 1, 0; the second only 1."""
        steps, m = torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]])
        teacher = lambda x, t, cond: gaussian(x, t, cond["m"] if isinstance(cond, dict) else cond)  # noqa: E731
        x = torch.ones(2, 1)
        flat = ap.heun_solve_between(teacher, x, 2.0, 1.0, steps, cond=m)
        for make in (lambda m: {"m": m}, lambda m: MappingProxyType({"m": m})):
            nested = ap.heun_solve_between(
                lambda x, t, cond: gaussian(x, t, cond["m"]), x, 2.0, 1.0, steps, cond=make(m)
            )
            assert torch.equal(nested, flat)
        for i in range(2):
            alone = ap.heun_solve_between(teacher, x[i : i + 1], 2.0, 1.0, steps[i : i + 1], cond=m[i : i + 1])
            torch.testing.assert_close(flat[i : i + 1], alone)

    def test_sdxl_and_prompts_in_a_distillation_loss(self) -> None:
        """`added_cond_kwargs` and a list of prompts, with a number of steps for each sample."""
        scale = torch.tensor([1.0, 0.5, 2.0])
        told = {
            "added_cond_kwargs": {"time_ids": scale[:, None].expand(-1, 6), "text_embeds": scale[:, None]},
            "prompts": ["1.0", "0.5", "2.0"],
            "table": ap.common(scale),
        }

        def teacher(x: Tensor, t: Tensor, added_cond_kwargs: Any, prompts: list[str], table: Tensor) -> Tensor:
            assert table.tolist() == scale.tolist()
            assert added_cond_kwargs["time_ids"][:, 5].tolist() == [float(prompt) for prompt in prompts]
            return gaussian(x, t, added_cond_kwargs["text_embeds"])

        def student(x: Tensor, t: Tensor, s: Tensor, **told: Any) -> Tensor:
            assert told["table"].tolist() == scale.tolist()
            return x + ap.expand_to((s - t) / t, x) * (x - teacher(x, t, **told))

        x_0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        times = ap.JumpTimes(
            torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.5, 0.9]), torch.tensor([0.5, 0.1, 0.2])
        )
        steps = torch.tensor([1, 3, 2])
        loss = partial(ap.trajectory_distillation_loss, teacher, student, student, distance=ap.squared_error)
        together = loss(x_0, x_0, times, num_steps=steps, **told)
        for i in range(3):
            one = slice(i, i + 1)
            alone = loss(
                x_0[one], x_0[one], ap.JumpTimes(times.t[one], times.u[one], times.s[one]), num_steps=steps[one],
                added_cond_kwargs={name: value[one] for name, value in told["added_cond_kwargs"].items()},
                prompts=told["prompts"][one], table=told["table"],
            )  # fmt: skip
            torch.testing.assert_close(together.terms["target"][one], alone.terms["target"])


class UNet(nn.Module):
    """Adds its prompt to its time embedding as U-Nets do, so that both must have x's rows."""

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor, added: Any = None) -> Tensor:
        embedding = time[:, None].expand(-1, prompt.shape[-1])
        assert embedding.shape == prompt.shape, f"size of tensor a {embedding.shape} must match {prompt.shape}"
        shift = (prompt if added is None else prompt + added["embeds"]).mean(1)
        return 0.1 * x + ap.expand_to(shift, x)


class TestBuiltWith:
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 2.0)

    def denoiser(self, **condition: Any) -> ap.NetworkDenoiser:
        return ap.denoiser_from_network(UNet(), "sample", ap.EDMSchedule(), **condition)

    def test_a_null_prompt_fits_every_batch(self) -> None:
        prompts, null = torch.randn(5, 4), torch.full((1, 4), 0.5)
        teacher = ap.guide(self.denoiser(), self.denoiser(prompt=null), 3.0)
        u = 0.1 * self.x + 0.5
        c = 0.1 * self.x + prompts.mean(1, keepdim=True)
        torch.testing.assert_close(teacher(self.x, self.t, prompt=prompts), u + 3 * (c - u))
        levels, stop = torch.tensor([2.0, 1.0, 0.5, 0.2]), torch.tensor([0, 1, 3, 2, 3])
        together = ap.heun_solve(teacher, self.x, levels, 0, stop, prompt=prompts)
        for i in range(5):
            one = slice(i, i + 1)
            alone = ap.heun_solve(teacher, self.x[one], levels, 0, stop[one], prompt=prompts[one])
            torch.testing.assert_close(together[one], alone)
        data = torch.utils.data.TensorDataset(self.x, prompts)
        ap.estimate_statistics(
            teacher, data, LEVELS, 10, 3, s_method="jvp", progress=False, condition=lambda p: {"prompt": p}
        )

    @pytest.mark.parametrize("num", [1, 5])
    def test_nested_and_compiled(self, num: int) -> None:
        denoiser = self.denoiser(prompt=torch.ones(1, 4), added={"embeds": torch.ones(1, 4)})
        compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
        for called in (denoiser, compiled):
            torch.testing.assert_close(called(self.x[:num], self.t[:num]), 0.1 * self.x[:num] + 2)

    def test_strings_arrays_and_marks(self) -> None:
        def network(x: Tensor, time: Tensor, **told: Any) -> Tensor:
            assert told["prompt"] == [""] * 5
            assert told["array"].shape == (5, 2)
            assert told["table"].shape == (1, 3)
            assert told["scale"].shape == ()
            return x

        built = {
            "prompt": [""],
            "array": np.ones((1, 2)),
            "table": ap.common(torch.ones(1, 3)),
            "scale": torch.ones(()),
        }
        ap.denoiser_from_network(network, "sample", ap.EDMSchedule(), **built)(self.x, self.t)

    def test_what_is_nested_follows_x_to_its_device(self) -> None:
        seen = []

        def network(x: Tensor, time: Tensor, **told: Any) -> Tensor:
            seen.extend([told["added"]["embeds"], *told["pair"], told["called"][0]])
            return x

        built = {"added": {"embeds": torch.ones(1, 4)}, "pair": (torch.ones(3), torch.ones(1))}
        denoiser = ap.NetworkDenoiser(network, ap.EDMPreconditioning(0.5), built)
        denoiser(self.x.to("meta"), self.t.to("meta"), called=(torch.ones(2),))
        assert [value.device.type for value in seen] == ["meta"] * 4


TOLD = torch.tensor([2.0, 3.0, 4.0])  # as many as samples


def doors() -> Iterator[tuple[str, Callable[[Callable[..., Tensor], Any], object]]]:
    """Yield everything public that takes conditions, as a function of a teacher or student and a condition."""
    x, t, s = torch.ones(3, 2), torch.full((3,), 2.0), torch.full((3,), 0.5)
    levels = torch.tensor([2.0, 1.0, 0.5])
    times, jumps = ap.JumpTimes(t, t / 2, s), (3.0, 2.0)
    schedule = ap.EDMSchedule()
    yield "heun_step", lambda f, c: ap.heun_step(f, x, t, s, told=c)
    yield "euler_step", lambda f, c: ap.euler_step(f, x, t, s, told=c)
    yield "velocity", lambda f, c: ap.probability_flow_velocity(f, x, t, told=c)
    yield "solve_ode", lambda f, c: ap.solve_ode(f, x, levels, told=c)
    yield "heun_solve", lambda f, c: ap.heun_solve(f, x, levels, 0, torch.tensor([0, 1, 2]), told=c)
    yield "heun_solve_between", lambda f, c: ap.heun_solve_between(f, x, t, s, torch.tensor([1, 2, 1]), told=c)
    yield "consistency loss", lambda f, c: ap.consistency_distillation_loss(f, f, f, x, x, times, told=c)
    yield "trajectory loss", lambda f, c: ap.trajectory_distillation_loss(f, f, f, x, x, times, told=c)
    yield "denoising_loss", lambda f, c: ap.denoising_loss(f, x, x, t, told=c)
    yield "one step", lambda f, c: ap.sample_one_step(f, x, told=c)
    yield "multistep", lambda f, c: ap.sample_multistep(f, x, [*jumps], told=c)
    yield "gamma", lambda f, c: ap.sample_gamma(f, x, [*jumps], 0.5, told=c)
    yield "deterministic", lambda f, c: ap.sample_deterministic(f, x, [*jumps], told=c)
    yield "gap", lambda f, c: ap.consistency_gap(f, ap.CTMPreconditioning(), x, t, s, num_steps=2, told=c)
    preconds = {"CTM": ap.CTMPreconditioning()}
    yield "gap_map", lambda f, c: ap.gap_map(f, preconds, x, x, levels, num_steps=2, progress=False, told=c)
    yield "alignment", lambda f, c: ap.trajectory_alignment(f, f, x, levels, num_steps=2, told=c)
    yield "guided", lambda f, c: ap.guide(f, lambda x, t: x, 2.0)(x, t, told=c)
    yield "network", lambda f, c: ap.denoiser_from_network(f, "sample", schedule)(x, t, told=c)
    yield "built", lambda f, c: ap.denoiser_from_network(f, "sample", schedule, told=c)(x, t)
    yield "edm", lambda f, c: ap.denoiser_from_edm(f)(x, t, told=c)
    yield "student", lambda f, c: ap.ConsistencyTrajectoryModel(f, ap.CTMPreconditioning())(x, t, s, told=c)
    yield "denoise", lambda f, c: ap.ConsistencyModel(f, ap.CTMPreconditioning()).denoise(x, t, told=c)


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("door", [door for _, door in doors()], ids=[name for name, _ in doors()])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"in": [c]}], ids=["bare", "nested"])
def test_no_mark_reaches_a_teacher_or_a_student(door: Any, wrap: Any) -> None:
    seen = []

    def either(x: Tensor, *levels: Tensor, told: Any) -> Tensor:
        seen.append(told)
        return 0.5 * x

    door(either, wrap(ap.common(TOLD)))
    assert seen
    for told in seen:
        assert (told["in"][0] if isinstance(told, dict) else told) is TOLD


@pytest.mark.usefixtures("around")
def test_marks_come_off_in_a_compiled_graph() -> None:
    student = ap.ConsistencyTrajectoryModel(lambda x, c_t, c_s, told: x * told.prod(), ap.CTMPreconditioning())
    teacher = lambda x, t, told: x * told["a"].prod()  # noqa: E731
    x, t, s = torch.ones(3, 2), torch.full((3,), 2.0), torch.full((3,), 0.5)
    told = ap.common(TOLD)
    compiled = torch.compile(student, backend="eager", fullgraph=True)(x, t, s, told=told)
    torch.testing.assert_close(compiled, student(x, t, s, told=told))
    step = torch.compile(lambda x: ap.heun_step(teacher, x, t, s, told={"a": told}), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x), ap.heun_step(teacher, x, t, s, told={"a": told}))


# --- random nestings give the numbers of sample-by-sample calls ---

KINDS = [
    "dict",
    "OrderedDict",
    "UserDict",
    "MappingProxyType",
    "ModelOutput",
    "tuple",
    "NamedTuple",
    "frozen dataclass",
]
Nesting = list[str]
nestings = st.lists(st.sampled_from(KINDS), max_size=3)
leaves = st.sampled_from(["tensor", "array", "strings", "numbers", "tokens"])


def leaf_of(values: list[float], kind: str) -> Any:
    """Return a number for each sample in one of the forms that a condition can have."""
    if kind == "tensor":
        return torch.tensor(values)
    if kind == "array":
        return np.array(values)
    if kind == "tokens":
        return [torch.full((6 + i, 2), value) for i, value in enumerate(values)]
    return [str(value) for value in values] if kind == "strings" else values


def factor_of(condition: Any, nesting: Nesting, count: int) -> Tensor:
    """Return the numbers of a call's rows again, and check what is common."""
    for kind in nesting:
        condition, common = CONTAINERS[kind][1](condition)
        assert common is TABLE or common == (1, 2)
    assert len(condition) == count
    numbers = [float(entry.flatten()[0]) if isinstance(entry, Tensor) else float(entry) for entry in condition]
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def nested(values: list[float], kind: str, nesting: Nesting, common: Any) -> Any:
    condition = leaf_of(values, kind)
    for container in reversed(nesting):
        condition = CONTAINERS[container][0](condition, common)
    return condition


def teacher_of(nesting: Nesting) -> Callable[..., Tensor]:
    return lambda x, t, told: gaussian(x, t, factor_of(told, nesting, len(x)).to(x))


VALUES = [0.5, 1.0, 1.5, 0.8, 1.2]


@settings(max_examples=25, deadline=None)
@given(nestings, leaves, st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_estimates_as_sample_by_sample(nesting: Nesting, kind: str, loaded: int, batch_size: int, marked: bool) -> None:
    """Batches as they are loaded, cut to the batch size; small ones with several levels in a call."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common = ap.common(TABLE) if marked else (1, 2)

    def estimate(size: int, batch_size: int) -> ap.TeacherStatistics:
        batches = [(x[i : i + size], VALUES[i : i + size]) for i in range(0, 5, size)]
        condition = lambda values: {"told": nested(values, kind, nesting, common)}  # noqa: E731
        options: dict[str, Any] = {"num_samples": 10, "batch_size": batch_size, "progress": False}
        return ap.estimate_statistics(teacher_of(nesting), batches, LEVELS, condition=condition, **options)

    torch.testing.assert_close(estimate(loaded, batch_size).l, estimate(1, 1).l, rtol=1e-10, atol=0)


@settings(max_examples=40, deadline=None)
@given(nestings, leaves, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_solutions_as_sample_by_sample(nesting: Nesting, kind: str, steps: list[int], marked: bool) -> None:
    x = torch.randn(len(steps), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common = ap.common(TABLE) if marked else (1, 2)

    def solve(first: int, last: int) -> Tensor:
        told = nested(VALUES[first:last], kind, nesting, common)
        number = torch.tensor(steps[first:last])
        return ap.heun_solve_between(teacher_of(nesting), x[first:last], 2.0, 1.0, number, told=told)

    alone = torch.cat([solve(i, i + 1) for i in range(len(steps))])
    torch.testing.assert_close(solve(0, len(steps)), alone, rtol=1e-10, atol=0)
