"""A student starts as its teacher, or the report and a warning say what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

import analytic_precond as ap


class MagnitudePreserving(nn.Module):
    """As EDM2's layers: the weight has unit norm, in training by being rewritten."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        def normalized(w: Tensor) -> Tensor:
            return w / (1e-4 + w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)))

        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalized(self.weight))
        w = normalized(self.weight) * gain
        return linear(x, w) if w.ndim == 2 else conv2d(x, w, padding=1)


class Teacher(nn.Module):
    """Data and a time; the student's are wider in what they take and in the middle."""

    def __init__(self, data: int = 3, time: int = 4, width: int = 6) -> None:
        super().__init__()
        self.enter, self.exit = nn.Conv2d(data, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.embed = nn.Linear(time, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.exit(torch.tanh(self.enter(x) + self.embed(time)[:, :, None, None]))


X, TIME = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, 4, 4), (9,)))


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("wider", [{"data": 5}, {"time": 9}, {"width": 8}, {"data": 5, "time": 9, "width": 8}])
def test_a_wider_student_starts_as_its_teacher(wider: dict[str, int]) -> None:
    teacher, student = Teacher(), Teacher(**wider)
    expected = teacher(X[:, :3], TIME[:, :4])

    def answer() -> Tensor:
        return student(X[:, : wider.get("data", 3)], TIME[:, : wider.get("time", 4)])

    by_name = copy.deepcopy(student.state_dict())
    with pytest.warns(UserWarning, match=r"shapes, got others, left .*\.weight \(.* and \(.*; partial=True copies"):
        left = ap.initialize_from_teacher(student, teacher)
    assert left.mismatched
    assert not left.kept
    assert not left.unused
    assert not left.widened
    assert (answer() - expected).abs().max() > 0.05
    assert all(torch.equal(student.state_dict()[name], by_name[name]) for name in left.mismatched)

    report = ap.initialize_from_teacher(student, teacher, partial=True)
    assert report.widened == left.mismatched
    assert report.copied == left.copied
    assert not report.mismatched
    torch.testing.assert_close(answer(), expected, rtol=0, atol=5e-7)  # the order of float32 sums
    for name in report.widened:  # what comes after the teacher's is there to be learnt
        assert student.state_dict()[name].count_nonzero() == teacher.state_dict()[name].numel()
    answer().square().mean().backward()
    assert set(report.widened) <= {name for name, p in student.named_parameters() if p.grad.abs().max() > 0}


def test_what_is_smaller_or_of_other_dimensions_is_left_in_any_case() -> None:
    teacher = nn.ModuleDict(
        {"a": nn.Linear(2, 2), "b": nn.Linear(3, 3), "c": nn.Conv2d(3, 3, 1), "old": nn.Linear(1, 1)}
    )
    student = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(4, 2), "c": nn.Linear(3, 3), "new": nn.Linear(1, 1)})
    with pytest.warns(UserWarning, match=r"b\.weight \(2, 4\) and \(3, 3\), b\.bias \(2,\) and \(3,\), c\.weight"):
        report = ap.initialize_from_teacher(student, teacher, partial=True)
    assert report.mismatched == ["b.weight", "b.bias", "c.weight"]
    assert report.copied == ["a.weight", "a.bias", "c.bias"]
    assert report.kept == ["new.weight", "new.bias"]
    assert report.unused == ["old.weight", "old.bias"]
    assert not report.widened
    report = ap.initialize_from_teacher(student, teacher, zero=["b", "c.weight"])  # left, and zeroed: no surprise
    assert not report.mismatched
    assert report.zeroed == ["b.weight", "b.bias", "c.weight"]


class TwoTimes(nn.Module):
    """A magnitude-preserving embedding of the target time, behind a gain."""

    def __init__(self, two_times: bool = True) -> None:
        super().__init__()
        self.embed = MagnitudePreserving(4, 3)
        if two_times:
            self.embed_s, self.gain_s = MagnitudePreserving(4, 3), nn.Parameter(torch.ones(()))

    def forward(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        return self.embed(t) if s is None else self.embed(t) + self.embed_s(s, self.gain_s)


def test_a_magnitude_preserving_layer_starts_behind_a_gain_of_zero() -> None:
    t, s = torch.randn(2, 5, 3)
    teacher = TwoTimes(two_times=False)
    contributions = {}
    for zero in ("gain_s", "embed_s"):
        student = TwoTimes()
        report = ap.initialize_from_teacher(student, teacher, zero=[zero])
        assert report.zeroed == [{"gain_s": "gain_s", "embed_s": "embed_s.weight"}[zero]]
        torch.testing.assert_close(student(t, s), teacher(t), rtol=1e-6, atol=1e-6)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        (student(t, s) - 1).square().mean().backward()
        optimizer.step()
        contributions[zero] = (student(t, s) - student(t)).abs().max()
    assert contributions["gain_s"] < 5e-3  # as much as the step
    assert contributions["embed_s"] > 0.3  # whole


@pytest.mark.parametrize(
    ("zero", "error", "message"),
    [
        (["gain"], ValueError, r"'gain' has no parameters in the student; the student's own: \['embed_s\.weight', 'ga"),
        (["gain_s", "embed.weight"], ValueError, r"'embed\.weight' is also the teacher's"),
        ("gain_s", TypeError, r"got the string 'gain_s': write \['gain_s'\]"),
    ],
)
def test_refuses_and_changes_nothing(zero: Any, error: type[Exception], message: str) -> None:
    student = TwoTimes()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=message):
        ap.initialize_from_teacher(student, TwoTimes(two_times=False), zero)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_names_that_overlap_are_zeroed_once() -> None:
    report = ap.initialize_from_teacher(TwoTimes(), TwoTimes(False), ["embed_s", "embed_s.weight", "gain_s"])
    assert report.zeroed == ["embed_s.weight", "gain_s"]
