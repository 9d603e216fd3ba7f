r"""From a teacher and data to `TeacherStatistics`, in one streaming pass (docs/method.md, section 5)."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_choice, check_count
from .._conditions import Condition
from .._precision import wide_dtype
from ..data.arguments import TeacherPass, warn_if_guided
from ..data.memory import BatchSize
from ..data.processes import processes
from ..data.sources import open_source, pair_noise, weights_of
from ..statistics.moments import MOMENTS
from ..statistics.teacher_statistics import L_METHODS, S_METHODS, TeacherStatistics
from ..teachers.denoiser import Denoiser
from .checkpoint import Checkpoint, Request
from .measurement import Measurement, where
from .run import EstimationRun


@torch.no_grad()
def estimate_statistics(
    denoiser: Denoiser,
    data: object,
    levels: Tensor | None = None,
    num_samples: int = 4096,
    batch_size: BatchSize = 256,
    l_method: str = "stein",
    s_method: str = "transport",
    seed: int = 0,
    progress: bool = True,
    *,
    intercept: bool = False,
    per_element: bool = False,
    condition: Callable[..., Condition] | None = None,
    device: torch.device | str | None = None,
    description: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
) -> TeacherStatistics:
    r"""Estimate a teacher's coefficients $l_t$, $s_t$ and the remainder's RMS over a grid of noise levels.

    Clean samples $x_0$ are paired with noise $n$; the noisy samples $x_0 \pm t n$ are the same at every level. The
    defaults need forward passes only, one per noisy sample and level:

    - ``"stein"``: $l_t = \sum n \cdot (D(x_0 + t n) - D(x_0 - t n)) / (2 t \sum n \cdot n)$,
    - ``"transport"``: $s_t = \frac{d}{d\lambda} \ln rms(g)$ with $g = D - l_t x$, exact if the teacher's marginals are
      the data's.

    The others differentiate the teacher: l by ``"hutchinson"`` probes $v^T (\partial D/\partial x) v$ (one JVP each,
    or a VJP where a layer has no forward mode) or from the ``"exact"`` diagonal (d of them); s by ``"jvp"`` or by
    ``"finite-difference"`` along the ODE (two more forward passes); docs/method.md, section 5, compares them.

    Args:
        denoiser: The teacher, in eval mode: called as ``denoiser(x, t, **condition)`` with ``x`` of shape ``(B, ...)``
            in the data's dtype (float32 at least), ``t`` of shape ``(B,)``. Its parameters need no gradients.
        data: Clean data in the teacher's range: a tensor ``(N, ...)``, a Dataset (or what else has a length and an
            index), a DataLoader or an iterable of batches. A batch is a tensor or a tuple ``(x, label, ...)``. Reused
            with new noise where it is short.
        levels: Decreasing noise levels, shape ``(K,)``. Default: `log_noise_levels` (120 from 80 to 0.002), inside
            what the teacher knows (`NetworkDenoiser.noise_range`). Levels outside that give a warning.
        num_samples: Noisy samples per level, two for each clean one; an odd one is left out.
        batch_size: Largest batch that the teacher sees; several levels share a call where the data's are small.
            ``"auto"`` begins at 256 and halves it where memory runs out. It does not change the result, beyond
            rounding.
        l_method: ``"stein"``, ``"hutchinson"`` or ``"exact"``.
        s_method: ``"transport"``, ``"jvp"`` or ``"finite-difference"``.
        seed: Seed of noise and data order; the same seed gives the same numbers. The global RNG is left as it was.
        progress: Show a progress bar.
        intercept: Regress D on (x, 1) instead of x, so that a mean of the data does not enter g. It changes ``g_rms``
            and ``s``; jumps stay ``c_skip x + c_out D``, without an additive term.
        per_element: Keep the sums of each element of a sample too, for coefficients of its own (``stats.elements``).
            They take 64 bytes per element and level (104 with derivatives), 94 MB for 64x64x3 on 120 levels, and change
            nothing else. Other numbers of processes change their rounding.
        condition: Turns what follows ``x`` in a batch into the teacher's keyword arguments, e.g.
            ``lambda label: {"class_labels": one_hot(label)}``. Without it, labels are ignored. What it
            returns follows the samples: see `common`.
        device: Where the teacher runs. Default: the device of its parameters or buffers, else the data's.
        description: The teacher in words, for the file's header. Default: its name.
        resume: A file that keeps what is finished: an interrupted estimate, called again in the same way, goes on from
            there and ends with the same numbers, bit for bit.
        checkpoint_every: Batches from one writing of that file to the next.

    Returns:
        The statistics. In a torch.distributed process group each process measures a share of the samples; all must make
        this call, and all get the same statistics.

    Raises:
        TypeError: If an argument has the wrong type, or data are not floating-point.
        ValueError: If an argument is out of range, data are empty or not finite, or the teacher returns a wrong shape
            or a value that is not finite (the error names the level and the batch); if ``resume`` holds something else,
            or the processes of a group ask for different things.
        OSError: If ``resume`` cannot be written: before the teacher is asked, or with the previous file intact.
        RuntimeError: If another process of the group has failed; the error says with what.

    Examples:
        >>> from analytic_precond import GaussianDenoiser, estimate_statistics
        >>> data = 0.5 * torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
        >>> levels = torch.tensor([2.0, 1.0, 0.5])
        >>> stats = estimate_statistics(GaussianDenoiser(0.25), data, levels, progress=False)
        >>> stats.l  # 0.25 / (0.25 + t^2)
        tensor([0.0588, 0.2000, 0.5000], dtype=torch.float64)
    """
    with processes() as together:
        check_count(num_samples, 2, "num_samples", "Samples come in pairs x_0 + t n, x_0 - t n.")
        if intercept:
            check_count(num_samples, 4, "num_samples", "An intercept needs two pairs.")
        check_choice(l_method, L_METHODS, "l_method")
        check_choice(s_method, S_METHODS, "s_method")
        asked = TeacherPass(denoiser, data, levels, 120, batch_size, seed, condition, device, description)
        asked.warn()
        if s_method == "transport":
            warn_if_guided(denoiser)
        measure = Measurement(denoiser, l_method, s_method, asked.pieces)
        levels, num_levels, largest = asked.levels, len(asked.levels), asked.pieces.size
        checkpoint = None if resume is None else Checkpoint(resume, checkpoint_every, batch_size)

        with asked.rng_kept():
            source = open_source(data, largest, seed)
            compared = checkpoint is not None or together.size > 1
            request = Request(
                tuple(levels.tolist()), num_samples, l_method, s_method, seed, intercept, condition is not None,
                asked.name, source.words, weights_of(denoiser) if compared else "", per_element,
            )  # fmt: skip
            run = EstimationRun(together, request, source, checkpoint)
            bar = tqdm(
                total=2 * run.num_units * num_levels,
                initial=2 * run.state.num_done * num_levels,
                desc=f"statistics of {asked.name}",
                unit=" passes",
                unit_scale=True,
                disable=not progress or together.rank > 0,
            )
            with bar, run.interruptible():
                for number, batch in run.batches(largest, asked.device):
                    x_0, first, state = batch.x, batch.first, run.state
                    noise, probes = pair_noise(seed, first, len(x_0), x_0.shape[1:], probes=l_method == "hutchinson")
                    # an intercept takes the square of a mean away, which may hide all but 1e-7 of what is left
                    wide = wide_dtype(x_0.device)
                    noise = noise.to(x_0.device, wide if intercept else x_0.dtype)
                    probes = None if probes is None else probes.to(x_0)
                    keywords = asked.conditions(batch)

                    moments = noise.new_empty(num_levels, len(x_0), len(MOMENTS), dtype=wide)
                    for part in measure(x_0, noise, probes, levels, keywords, number):
                        seen = 2 * (first + part.samples.stop)
                        bar.set_postfix(level=f"{part.level + 1}/{num_levels}", samples=seen, refresh=False)
                        moments[part.level, part.samples] = part.moments
                        state.add_features(part.level, first + part.samples.start, part.features)
                        bar.update(2 * len(part.moments))
                    moments = moments.to("cpu", torch.float64)  # one transfer per batch
                    _check_moments(moments, levels, number)
                    state.add(first, moments)
            return run.statistics()


def _check_moments(moments: Tensor, levels: Tensor, batch: int) -> None:
    """Refuse a batch in which the teacher returned NaN, infinity or values whose squares overflow."""
    finite = torch.isfinite(moments).all(-1)
    if not bool(finite.all()):
        k, sample = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the teacher must return finite values, got NaN or infinity at {where([levels[k].item()], k, batch)}, "
            f"sample {sample}: check its weights and precision (fp16 ends at 65504), and that data are in its range."
        )
