r"""From a teacher and data to `TeacherStatistics`, in one streaming pass (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._checks import check_choice, check_count, check_levels, wide_dtype
from .batches import iterate_batches, pair_noise
from .derivatives import Condition
from .measurement import Measurement
from .moments import Centering, MomentSums, reference
from .noise_levels import log_noise_levels
from .teacher import Denoiser
from .teacher_inputs import check_request, device_of, keywords_of, name_of
from .teacher_statistics import L_METHODS, S_METHODS, StatisticsHeader, TeacherStatistics


@torch.no_grad()
def estimate_statistics(
    denoiser: Denoiser,
    data: object,
    levels: Tensor | None = None,
    num_samples: int = 4096,
    batch_size: int = 256,
    l_method: str = "stein",
    s_method: str = "transport",
    seed: int = 0,
    progress: bool = True,
    *,
    intercept: bool = False,
    condition: Callable[..., Condition] | None = None,
    device: torch.device | str | None = None,
    description: str | None = None,
) -> TeacherStatistics:
    r"""Estimate a teacher's coefficients $l_t$, $s_t$ and the remainder's RMS over a grid of noise levels.

    Clean samples $x_0$ are paired with noise $n$; the noisy samples $x_0 \pm t n$ are the same at every level. The
    defaults need forward passes only, one per noisy sample and level:

    - ``"stein"``: $l_t = \sum n \cdot (D(x_0 + t n) - D(x_0 - t n)) / (2 t \sum n \cdot n)$,
    - ``"transport"``: $s_t = \frac{d}{d\lambda} \ln rms(g)$ with $g = D - l_t x$, exact if the teacher's marginals are
      the data's.

    The others differentiate the teacher: l by ``"hutchinson"`` probes $v^T (\partial D/\partial x) v$ (one JVP each,
    or a VJP where a layer has no forward mode) or from the ``"exact"`` diagonal (d of them); s by ``"jvp"`` or by
    ``"finite-difference"`` along the ODE (two more forward passes). docs/method.md, section 5, compares them.

    Args:
        denoiser: The teacher, in eval mode: called as ``denoiser(x, t, **condition)`` with ``x`` of shape ``(B, ...)``
            in the data's dtype (float32 at least), ``t`` of shape ``(B,)``. Its parameters need no gradients.
        data: Clean data in the teacher's range: a tensor ``(N, ...)``, a Dataset, a DataLoader or an iterable of
            batches. A batch is a tensor or a tuple ``(x, label, ...)``. Reused with new noise where it is short.
        levels: Decreasing noise levels, shape ``(K,)``. Default: `log_noise_levels` (120 from 80 to 0.002).
        num_samples: Noisy samples per level, two for each clean one; an odd one is left out.
        batch_size: Largest batch that the teacher sees. It does not change the result, beyond rounding.
        l_method: ``"stein"``, ``"hutchinson"`` or ``"exact"``.
        s_method: ``"transport"``, ``"jvp"`` or ``"finite-difference"``.
        seed: Seed of noise and data order; the same seed gives the same numbers. The global RNG is left as it was.
        progress: Show a progress bar.
        intercept: Regress D on (x, 1) instead of x, so that a mean of the data does not enter g. It changes ``g_rms``
            and ``s``; jumps stay ``c_skip x + c_out D``, without an additive term.
        condition: Turns what follows ``x`` in a batch into the teacher's keyword arguments, e.g.
            ``lambda label: {"class_labels": one_hot(label)}``. Without it, labels are ignored.
        device: Where the teacher runs. Default: the device of its parameters or buffers, else the data's.
        description: The teacher in words, for the file's header. Default: its name.

    Returns:
        The statistics.

    Raises:
        TypeError: If an argument has the wrong type, or data are not floating-point.
        ValueError: If an argument is out of range, data are empty or not finite, or the teacher returns a wrong shape
            or a value that is not finite (the error names the level and the batch).

    Example:
        >>> from analytic_precond import GaussianDenoiser, estimate_statistics
        >>> data = 0.5 * torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
        >>> levels = torch.tensor([2.0, 1.0, 0.5])
        >>> stats = estimate_statistics(GaussianDenoiser(0.25), data, levels, progress=False)
        >>> stats.l  # 0.25 / (0.25 + t^2)
        tensor([0.0588, 0.2000, 0.5000], dtype=torch.float64)
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, t), got {type(denoiser).__name__}.")
    levels = log_noise_levels() if levels is None else levels
    check_levels(levels)
    check_count(num_samples, 2, "num_samples", "Samples come in pairs x_0 + t n, x_0 - t n.")
    if intercept:
        check_count(num_samples, 4, "num_samples", "An intercept needs two pairs.")
    check_request(batch_size, seed, condition, description)
    check_choice(l_method, L_METHODS, "l_method")
    check_choice(s_method, S_METHODS, "s_method")
    levels = levels.detach().to("cpu", torch.float64)
    device = device_of(denoiser, data) if device is None else torch.device(device)
    num_pairs, num_levels = num_samples // 2, len(levels)

    name = name_of(denoiser, description)
    measure = Measurement(denoiser, l_method, s_method)
    sums = MomentSums(num_pairs, num_levels)
    centering = Centering(num_pairs, num_levels) if intercept else None
    sample_shape, precision = None, ""
    bar = tqdm(
        total=2 * num_pairs * num_levels,
        desc=f"statistics of {name}",
        unit=" passes",
        unit_scale=True,
        disable=not progress,
    )
    with bar, torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # for a DataLoader that shuffles
        for number, batch in enumerate(iterate_batches(data, num_pairs, batch_size, seed)):
            x_0 = batch.x if device is None else batch.x.to(device)
            x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))  # half precision cannot hold x_0 + 0.002 n
            if sample_shape is None:
                sample_shape, precision = x_0.shape[1:], str(x_0.dtype).removeprefix("torch.")
            if x_0.shape[1:] != sample_shape:
                raise ValueError(
                    f"data must hold samples of one shape, got {tuple(x_0.shape[1:])} in batch {number} after "
                    f"{tuple(sample_shape)}: resize them first."
                )
            noise, probes = pair_noise(seed, batch.first, len(x_0), sample_shape, probes=l_method == "hutchinson")
            noise = noise.to(x_0.device, wide_dtype(x_0.device))
            keywords = {} if condition is None else keywords_of(condition(*batch.extra), x_0.device)

            rows = []
            for k, t in enumerate(levels.tolist()):
                bar.set_postfix(level=f"{k + 1}/{num_levels}", samples=2 * (batch.first + len(x_0)), refresh=False)
                moments, features = measure(x_0, noise, probes, t, keywords, _where(k, t, number))
                rows.append(moments)
                if centering is not None:
                    centering.add(k, batch.first, features)
                bar.update(2 * len(x_0))
            all_moments = torch.stack(rows).to("cpu", torch.float64)  # one transfer per batch
            _check_moments(all_moments, levels, number)
            sums.add(batch.first, all_moments)

    assert sample_shape is not None
    means = None if centering is None else centering.close(sums)
    header = StatisticsHeader(l_method, s_method, (seed,), tuple(sample_shape), precision, name)
    filled = sums.counts > 0
    a = torch.from_numpy(reference(levels.numpy()))[:, None]  # D = E + a x
    return TeacherStatistics(
        levels,
        sums.counts[filled],
        sums.values[filled],
        header,
        None if means is None else (means[:, 0] + a * means[:, 1]).reshape(num_levels, *sample_shape),
        None if means is None else means[0, 1].reshape(sample_shape),
    )


def _where(level: int, t: float, batch: int) -> str:
    return f"noise level {t:.6g} (index {level}), batch {batch}"


def _check_moments(moments: Tensor, levels: Tensor, batch: int) -> None:
    """Refuse a batch in which the teacher returned NaN, infinity or values whose squares overflow."""
    finite = torch.isfinite(moments).all(-1)
    if not bool(finite.all()):
        k, sample = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the teacher must return finite values, got NaN or infinity at {_where(k, levels[k].item(), batch)}, "
            f"sample {sample}: check its weights and precision (fp16 ends at 65504), and that data are in its range."
        )
