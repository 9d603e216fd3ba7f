r"""What a check of a teacher found, level by level and in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill

from torch import Tensor

from ..statistics.teacher_statistics import TeacherStatistics

VERDICTS = ("consistent", "close", "inconsistent")
_SIGMAS = 4.0  # standard errors that are put down to sampling: 40 levels and three checks rarely exceed them by chance

# Relative to the best affine denoiser's, the worst error of any level: with data in another range or another output it
# was 5 or more (two networks and a Gaussian), of networks trained briefly or not at all 1.1 to 2.9.
_CONVENTIONS = 4.0
_SAME = 1e-3  # relative: a network that answers the same input twice is exact to its precision


@dataclass(frozen=True, eq=False)
class LevelCheck:
    """Two numbers per noise level that a perfect teacher makes equal. All tensors have shape ``(K,)``.

    Attributes:
        value: The number.
        expected: What it should be.
        stderr: Standard error of their difference.
        exact: Differences up to here count as none.
        close: Differences up to here are what trained networks have.
    """

    value: Tensor
    expected: Tensor
    stderr: Tensor
    exact: Tensor
    close: Tensor

    @property
    def excess(self) -> Tensor:
        """The difference less what sampling explains."""
        return ((self.value - self.expected).abs() - _SIGMAS * self.stderr).clamp(min=0)

    @property
    def grade(self) -> Tensor:
        """Index into `VERDICTS` per level: 0 consistent, 1 close, 2 inconsistent."""
        return (self.excess > self.exact).long() + (self.excess > self.close).long()

    @property
    def unclear(self) -> Tensor:
        """Whether sampling error alone exceeds what is allowed, and nothing could be found."""
        return (_SIGMAS * self.stderr > self.close) & (self.grade < 2)


@dataclass(frozen=True, eq=False, repr=False)
class TeacherReport:
    """What `check_teacher` found; ``print`` it.

    Attributes:
        statistics: The teacher's statistics on the levels checked.
        transport: s_t by transport, expected to be s_t by derivative.
        slope: l_t, expected to be the posterior variance over t^2.
        error: The denoising error relative to the best affine denoiser's, expected to be at most 1.
        repeat_difference: Relative RMS difference of two answers to the same input.
    """

    statistics: TeacherStatistics
    transport: LevelCheck
    slope: LevelCheck
    error: LevelCheck
    repeat_difference: float

    @property
    def levels(self) -> Tensor:
        """The noise levels checked. Shape ``(K,)``."""
        return self.statistics.levels

    @property
    def verdict(self) -> str:
        """The worst of all levels: ``"consistent"``, ``"close"`` or ``"inconsistent"``."""
        if self.repeat_difference > _SAME:
            return VERDICTS[2]
        return VERDICTS[max(int(check.grade.max()) for check in (self.transport, self.slope, self.error))]

    def __str__(self) -> str:
        """Say in words which levels disagree and what it may mean."""
        header = self.statistics.header
        rows = {
            f"s_t: transport = {header.s_method}": self.transport,
            "l_t = E|x_0 - D|^2 / (d t^2)": self.slope,
            "error / affine denoiser's <= 1": self.error,
        }
        width = max(map(len, rows))
        repeat = f"differs by {self.repeat_difference:.1e}" if self.repeat_difference > _SAME else "same answer"
        lines = [
            f"Teacher check of {header.description}: {self.verdict} ({self.statistics.num_samples} samples)",
            f"{'number of levels that are':<{width}}  consistent  close  inconsistent",
            *(f"{name:<{width}}{self._counts(check)}" for name, check in rows.items()),
            f"{'the same input again':<{width}}  {repeat}",
            *(fill(sentence, 110, initial_indent="- ", subsequent_indent="  ") for sentence in self._meaning()),
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _counts(self, check: LevelCheck) -> str:
        """Return the number of levels of each grade, and the worst level."""
        consistent, close, inconsistent = (int((check.grade == grade).sum()) for grade in range(3))
        k = int((check.excess / check.close).argmax())
        worst = f"{check.value[k]:.3g} for {check.expected[k]:.3g} at t = {self.levels[k]:.3g}"
        return f"  {consistent:10d}  {close:5d}  {inconsistent:12d}  worst: {worst}"

    def _meaning(self) -> Iterator[str]:
        """Yield what may be behind the verdict."""
        transport, slope, error = (check.grade == 2 for check in (self.transport, self.slope, self.error))
        unclear = self.transport.unclear | self.slope.unclear | self.error.unclear
        if self.repeat_difference > _SAME:
            yield "It is random: dropout is on, or noise is drawn or labels dropped inside. Call teacher.eval() first."
        if bool((error & (self.error.value > _CONVENTIONS)).any()):
            yield (
                f"{self._at(error)} an affine map denoises better, by much: the data are in another range than the "
                f"teacher was trained on (0..255, [0, 1], [-1, 1], latents not scaled), or what it returns is not D "
                f"but epsilon, v or a score (see denoiser_from_network), or t is not sigma."
            )
        elif bool((error | slope).any()):
            misfit = "an affine map denoises better" if bool(error.any()) else "its error does not fit its slope"
            yield (
                f"{self._at(error if bool(error.any()) else slope)} {misfit}, by less than data in another range or "
                f"another output would cause. It is inexact: trained briefly, or on other data. If it is well trained "
                f"on these, t is not sigma but scaled, squared or an index (see denoiser_from_network)."
            )
        if bool(transport.any()):
            yield (
                f"{self._at(transport)} its ODE does not carry the law of the noisy data: if that stays, estimate "
                f"statistics with s_method='{self.statistics.header.s_method}' rather than 'transport'."
            )
        if bool(unclear.any()) and self.verdict != VERDICTS[2]:
            yield f"{self._at(unclear)} sampling error exceeds what is allowed: take more samples to tell."
        if self.verdict == "close":
            yield "Small misfits beyond sampling error: what a trained network usually has."

    def _at(self, mask: Tensor) -> str:
        t = self.levels[mask]
        return f"At t = {t[0]:.3g}" if len(t) == 1 else f"At {len(t)} levels from t = {t[0]:.3g} to {t[-1]:.3g}"
