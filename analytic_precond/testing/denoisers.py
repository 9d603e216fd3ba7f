"""`assert_denoiser`: an adapter against somebody's own prediction of the clean data, with the usual mistakes named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_finite, check_levels, check_not_negative, check_tensor
from ..noise_levels.grids import log_noise_levels
from ..noise_levels.per_sample import expand_to
from ..noise_levels.schedules import Schedule
from ..noise_levels.vp_schedules import VPDiscreteSchedule
from ..teachers.denoiser import Denoiser
from ..teachers.networks import noise_range_of
from .mistakes import explain, explain_time_scale, rms


def assert_denoiser(
    denoiser: Denoiser,
    reference: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    levels: Tensor | None = None,
    *,
    schedule: Schedule | None = None,
    rtol: float = 1e-4,
    seed: int = 0,
) -> None:
    r"""Check that a denoiser gives the clean data that another code predicts, at all noise levels, for each sample.

    Samples of one batch get different noise levels from the denoiser, the same from the reference. If answers differ,
    the error says where and by how much, and which of the usual mistakes would make this of the reference's answers:
    time in the wrong direction or off by ``time_scale``, sigma told for an index, a missing $1 / \alpha$, x for
    $\alpha x$, the sign of the prediction, epsilon for v.

    Args:
        denoiser: ``denoiser(x, t)``, for example from `denoiser_from_network`, or your own. It gets
            $x = x_0 + t n$, and what is compared is in the same units.
        reference: Their prediction of the clean data, ``reference(x, t)``; with a schedule
            ``reference(alpha x, time)``: the input and the time that the network gets, one time for all samples of a
            call. That is `Schedule.network_time`, with ``time_scale`` in it: with 1000, a formula that counts from 0
            to 1 divides it by 1000.
        x_0: Clean samples, on the network's device and in the data's dtype. Shape ``(B, ...)``.
        levels: Decreasing noise levels. Shape ``(K,)``. Default: 12 over what denoiser or schedule know, else from
            0.002 to 80; with a table, on its levels.
        schedule: The reference's, if it wants its own variable and the network's time.
        rtol: What is allowed, relative to the RMS of x. Networks in half precision need 1e-2.
        seed: Of the noise n.

    Raises:
        AssertionError: If answers differ.
        TypeError: If ``x_0`` is not a floating-point tensor.
        ValueError: If it is empty or not finite, levels are no decreasing noise levels, or ``rtol`` is negative or not
            finite.

    Examples:
        >>> import analytic_precond as ap
        >>> exact = ap.GaussianMixtureDenoiser(torch.tensor([[-1.0], [1.0]]), 0.1)
        >>> x_0 = torch.tensor([[-1.2], [-1.0], [0.9], [1.3]])
        >>> def epsilon(z, time):  # what a network of rectified flow would predict
        ...     x, t = z / (1 - time[:, None]), time / (1 - time)
        ...     return (x - exact(x, t)) / t[:, None]
        >>> flow = ap.RectifiedFlowSchedule()
        >>> assert_denoiser(ap.denoiser_from_network(epsilon, "epsilon", flow), exact, x_0)
        >>> assert_denoiser(ap.denoiser_from_network(epsilon, "v", flow), exact, x_0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: the denoiser ... if the network predicts epsilon and it is taken for v.
    """
    check_not_negative(rtol, "rtol")
    check_tensor(x_0, "x_0")
    check_finite(x_0, "x_0")
    if x_0.ndim < 2 or x_0.numel() == 0:
        raise ValueError(f"x_0 must hold clean samples, shape (B, ...), got {tuple(x_0.shape)}: add a batch dimension.")
    t = _levels(denoiser, levels, schedule).to(x_0.device)[:, None]
    num = len(t)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(x_0)

    def exact(x: Tensor, t: Tensor, time_scale: float | None = None) -> Tensor:
        if schedule is None:
            return reference(x, t)
        time = schedule.network_time(t.double())
        if isinstance(schedule, VPDiscreteSchedule) and schedule.timesteps is not None and schedule.time_scale == 1:
            nearest = schedule.timesteps[(time[:, None] - schedule.timesteps.to(time)).abs().argmin(1)].to(time)
            time = torch.where((time - nearest).abs() < 1e-3, nearest, time)  # what float32 levels make of it
        time = time if not time.is_floating_point() else time.to(t.dtype)
        if time_scale not in (None, schedule.time_scale):
            time = time * (time_scale / schedule.time_scale)
        return reference(expand_to(schedule.alpha(schedule.time(t)), x).to(x.dtype) * x, time)

    level = t.to(x_0.dtype).expand(num, len(x_0))
    x = x_0 + level.reshape(*level.shape, *[1] * (x_0.ndim - 1)) * noise
    samples, got = torch.arange(len(x_0)), torch.empty_like(x)
    with torch.no_grad():
        for first in range(num):  # sample i at level first + i
            rows = (first + samples) % num
            got[rows, samples] = _answer(denoiser, "denoiser", x[rows, samples], level[rows, samples])
        expected = torch.stack([_answer(exact, "reference", *row) for row in zip(x, level, strict=True)])
        size, difference = rms(x), rms(got - expected)
        relative = (difference / size).nan_to_num(nan=torch.inf)
        if bool((relative <= rtol).all()):
            return
        alone = torch.stack([_answer(denoiser, "denoiser", *row) for row in zip(x, level, strict=True)])
        if bool((rms(alone - expected) <= rtol * size).all()):
            why = "Where all samples of a batch have one level it is right: it tells all of them the first one's."
        else:
            rows = (relative > rtol).any(1).nonzero()[:, 0]
            rows = rows[:: max(1, len(rows) // 4)]  # enough to tell mistakes apart
            why = explain_time_scale(denoiser, exact, schedule, x[rows], level[rows], rtol) or explain(
                denoiser, exact, schedule, x[rows], level[rows], got[rows], expected[rows]
            )
    k, i = divmod(int(relative.argmax()), len(x_0))
    raise AssertionError(
        f"the denoiser must give the reference's clean data within {rtol:g} of x, got an RMS difference of "
        f"{difference[k, i]:.3g} at t = {t[k, 0]:.6g}, sample {i}, where x has {size[k, i]:.3g} "
        f"({int((relative > rtol).any(1).sum())} of {num} levels differ). {why}"
    )


def _levels(denoiser: Denoiser, levels: Tensor | None, schedule: Schedule | None) -> Tensor:
    if levels is None:
        low, high = noise_range_of(denoiser) or (schedule and schedule.noise_range) or (0.002, 80.0)
        levels = log_noise_levels(12, low or min(0.002, high / 1e3), high if high < torch.inf else max(80.0, 1e3 * low))
        if isinstance(schedule, VPDiscreteSchedule):  # between them a code that knows the table only has no answer
            assert schedule.timesteps is not None
            table = schedule.timesteps.double()
            nearest = (schedule.time(levels.to(table))[:, None] - table).abs().argmin(1).unique()
            levels = schedule.noise_level(table[nearest]).flip(0)
    check_levels(levels)
    return levels.detach().double()


def _answer(function: Callable[[Tensor, Tensor], Tensor], name: str, x: Tensor, t: Tensor) -> Tensor:
    answer = function(x, t)
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise AssertionError(f"the {name} must return a tensor of x's shape {tuple(x.shape)}, got {got}.")
    return answer.to(x.dtype)
