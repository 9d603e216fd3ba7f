r"""`assert_preconditioning`: what every preconditioning promises, checked one property after another.

The order is that in which a fault is named best: what fails early would make much of what follows fail too.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from .._checks import check_not_negative
from ..preconditionings.base import Preconditioning
from .advice import ROUGHLY, boundary_advice, read_out_advice
from .jumps import Coefficients, Jumps

# of a step of 0.01 in lambda and the larger of a coefficient and its slope; smooth ones reach 1e-5 of it
_SMOOTH = 1e-3
_FEW = 0.1  # of the steps where slope and change disagree: a jump or a corner, not a wrong derivative


def assert_preconditioning(
    precond: Coefficients,
    levels: Tensor | None = None,
    *,
    target: float | None = None,
    sigma_data: float | None = None,
    rtol: float = 1e-6,
    backend: str | None = "eager",
) -> None:
    r"""Check what a preconditioning promises, whatever its formula.

    In this order, and the error begins with the word:

    - ``call``, ``shape``, ``dtype``: two tensors in the levels' broadcast shape; float64 for float64 levels,
    - ``finite``: for all pairs of levels, the ends included,
    - ``boundary``: $c_{skip}(t, t) = 1$ and $c_{out}(t, t) = 0$ exactly, in float64 and float32,
    - ``gradients``: autograd's derivatives in t and s are those of the values; ``smooth``: without steps or corners,
    - ``precision``: beside the diagonal c_out keeps ``rtol``, relative: nothing is a difference of float32 numbers;
      of a `Preconditioning`, which computes in float64 whatever its levels are, for float32 levels, too,
    - ``read-out``: $D = x - t\, \partial_s x_s |_{s = t}$, that is $t\, \partial_s c_{skip} = 1$ and
      $t\, \partial_s c_{out} = -1$ (docs/method.md, section 2),
    - ``broadcast``: pairs of levels give what they give alone,
    - of a module ``state_dict``, ``deepcopy``, ``half``, ``device``: coefficients survive what happens to a student,
    - ``compile``: compiled into one graph, it gives the same.

    Of a `Preconditioning` also that `jump` and `on_network` fit. Per element or mode, each has to pass.

    Args:
        precond: A `Preconditioning`, or any function ``(t, s) -> (c_skip, c_out)`` of tensors of noise levels that
            broadcast, the coefficients on the denoiser. Elements of a sample may have coefficients of their own, of
            shape ``(*levels, ...)``.
        levels: The noise levels to check, decreasing; the smallest and the largest are the range. Shape ``(K,)``.
            Default: 40 over a `Preconditioning`'s own range, else from 0.002 to 80.
        target: The one level that all jumps reach, if there is only one (Consistency Models); no read-out then.
        sigma_data: If given, the coefficients are those on a raw network in EDM's denoiser with this ``sigma_data``.
        rtol: What ``precision`` and ``read-out`` allow; tables of noisy statistics may need more.
        backend: Of `torch.compile`; None to leave that out.

    Raises:
        AssertionError: If a property fails: which, at what t and s, by how much, and what it may be.
        ValueError: If ``levels`` are no decreasing noise levels, or ``rtol`` is negative or not finite.

    Examples:
        >>> import analytic_precond as ap
        >>> assert_preconditioning(ap.CTMPreconditioning("variance"))
        >>> assert_preconditioning(lambda t, s: (s / t, 1 - s / t), backend=None)
        >>> assert_preconditioning(lambda t, s: (s / t, 0.5 * (1 - s / t)), backend=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: read-out: -t d/ds c_out: got 0.5, expected 1, off by 0.5 at t = ...
    """
    check_not_negative(rtol, "rtol")
    jumps = Jumps(precond, levels, target, sigma_data)
    _check_finite(jumps)
    _check_boundary(jumps)
    unsmooth = _check_slopes(jumps)
    _check_read_out(jumps, max(rtol, ROUGHLY))
    _check_precision(jumps, rtol)
    _check_read_out(jumps, rtol)
    if unsmooth is not None:
        raise unsmooth
    _check_broadcast(jumps, rtol)
    if isinstance(precond, Preconditioning):
        _check_jump(jumps, precond, rtol)
    if isinstance(precond, nn.Module):
        _check_module(jumps, precond)
    if backend is not None:
        _check_compiled(jumps, backend, rtol)


def _check_finite(jumps: Jumps) -> None:
    t, s = jumps.pairs()
    for name, c in jumps(t, s)._asdict().items():
        jumps.compare(f"finite: {name}", 0 * c, 0.0, 0.0, t, s, "NaN or infinite inside its range.")


def _check_boundary(jumps: Jumps) -> None:
    for dtype in (torch.float64, torch.float32):
        t = torch.cat([jumps.levels, jumps.dense()]).to(dtype)
        if jumps.target is not None:
            t = jumps.ends(t[:1])
        if not bool((t > 0).all()):
            continue  # a jump from clean data to clean data has no coefficients
        c_skip, c_out = (c.double() for c in jumps(t, t))
        why = partial(boundary_advice, jumps, t, (c_skip == 1) & (c_out == 0))
        jumps.compare("boundary: c_skip", c_skip, 1.0, 0.0, t, t, why)
        jumps.compare("boundary: c_out", c_out, 0.0, 0.0, t, t, why)


def _check_slopes(jumps: Jumps) -> AssertionError | None:
    """Refuse wrong derivatives; return what is not smooth, as a narrow read-out looks like that too."""
    low, high = jumps.levels[-1].item(), jumps.levels[0].item()
    ends = jumps.between(low, high, 1024)
    ways = [("t", ends, jumps.ends(torch.full_like(ends, low)))]
    if jumps.target is None:
        for start in jumps.levels[: -1 : max(1, len(jumps.levels) // 4)].tolist():
            ends = jumps.between(low, start, 1024)
            ways.append(("s", torch.full_like(ends, start), ends))
    found = None
    for by, t, s in ways:
        try:
            _check_steps(jumps, by, t, s)
        except AssertionError as error:
            if not str(error).startswith("smooth"):
                raise
            found = found or error
    return found


def _check_steps(jumps: Jumps, by: str, t: Tensor, s: Tensor) -> None:
    """Compare changes over short steps in t or s with slopes at their middles, which tile the range."""
    values = jumps(t, s)
    edges = t if by == "t" else s
    middles, steps = (jumps.column(v) for v in ((edges[1:] + edges[:-1]) / 2, edges.diff()))
    t, s = (middles.flatten(), s[1:]) if by == "t" else (t[1:], middles.flatten())
    for (name, value), slope in zip(values._asdict().items(), jumps.slopes(t, s, by), strict=True):
        size = torch.maximum(value[1:].abs(), (slope * middles).abs())
        allowed = _SMOOTH * size / middles + 1e-12 * size / steps
        change = value.diff(dim=0) / steps
        wrong = ~((slope - change).abs() <= allowed)
        what, why = "smooth", "It has a step or a corner there: students are trained across it."
        if wrong.double().mean() > _FEW:
            what = "gradients"
            why = (
                "Autograd's slope is not that of the values: perhaps detached, under no_grad, of levels rounded to "
                "those of a table, or a derivative of its own that is wrong."
            )
        jumps.compare(f"{what}: d/d{by} {name}", slope, change, allowed, t, s, why)


def _check_precision(jumps: Jumps, rtol: float) -> None:
    t, s = jumps.pairs()
    for h in (2e-4, 1e-5):
        near = jumps.dense() if jumps.target is None else jumps.ends(jumps.levels[:1]) * (1 + h)
        beside = jumps.ends(near * (1 - h))
        inside = (beside >= jumps.levels[-1]) & (near > beside) & (beside > 0)
        if bool(inside.any()):
            _check_beside_the_diagonal(jumps, near[inside], beside[inside], rtol, h)
            t, s = (torch.cat(pair) for pair in ((t, near[inside]), (s, beside[inside])))
    if isinstance(jumps.precond, Preconditioning):
        t, s = t.float(), torch.minimum(t.float(), s.float())
        why = "Coefficients of float32 levels must be computed in float64: differences of levels lose digits."
        wide = jumps(t.double(), s.double())
        for name, c, exact in zip(wide._fields, jumps(t, s), wide, strict=True):
            allowed = 1e-6 * (exact.abs() if name == "c_out" else exact.abs().clamp(min=1.0))
            jumps.compare(f"precision: {name} of float32 levels", c.double(), exact, allowed, t, s, why)


def _check_beside_the_diagonal(jumps: Jumps, t: Tensor, s: Tensor, rtol: float, h: float) -> None:
    """Compare short jumps with their slope at the middle, from which they differ by h^2 / 24, relatively."""
    middle = (t + s) / 2
    if jumps.target is None:
        slopes, steps = jumps.slopes(t, middle, "s"), jumps.column(s - t)
    else:
        slopes, steps = jumps.slopes(middle, s, "t"), jumps.column(t - s)
    c_skip, c_out = jumps(t, s)
    why = (
        f"On a jump as short as {h:.0e} t it is not what the slope there makes of it: perhaps digits are lost, as a "
        f"difference of float32 numbers errs by {6e-8 / h:.0e}. Compute in float64, and differences as (t - s) / t."
    )
    jumps.compare("precision: c_out", c_out, slopes.c_out * steps, rtol * c_out.abs(), t, s, why)
    jumps.compare("precision: c_skip - 1", c_skip - 1, slopes.c_skip * steps, rtol * (h + c_out.abs()), t, s, why)


def _check_read_out(jumps: Jumps, rtol: float) -> None:
    if jumps.target is not None:
        return
    t, skip, out = jumps.read_out()
    for name, ratio in (("-t d/ds c_out", out), ("t d/ds c_skip", skip)):
        jumps.compare(f"read-out: {name}", ratio, 1.0, rtol, t, t, partial(read_out_advice, jumps, rtol))


def _check_broadcast(jumps: Jumps, rtol: float) -> None:
    half = (len(jumps.levels) + 1) // 2
    t, s = jumps.levels[:half][:3], jumps.ends(jumps.levels[half:][-2:])
    together = jumps(t[:, None], s)
    alone = [[jumps(a, b) for b in s] for a in t]
    batch = jumps(t, s[-1:].expand_as(t))
    for k, (name, c) in enumerate(together._asdict().items()):
        for got, where in ((c, "in a table"), (batch[k][:, None], "in a batch")):
            expected = torch.stack([torch.stack([pair[k] for pair in row[-got.shape[1] :]]) for row in alone])
            allowed = rtol * (1 + expected.abs())  # longer vectors round differently, float32 tables too
            for j in range(got.shape[1]):
                ends = s[j - got.shape[1]].expand_as(t)
                why = f"A pair of levels must give {where} what it gives alone."
                jumps.compare(f"broadcast: {name}", got[:, j], expected[:, j], allowed[:, j], t, ends, why)


def _check_jump(jumps: Jumps, precond: Preconditioning, rtol: float) -> None:
    t, s = jumps.levels[:-1], jumps.ends(jumps.levels[1:])
    for levels in ((t, s), (t, t)) if jumps.target is None else ((t, s),):
        for name, c in precond.on_network(*levels)._asdict().items():
            jumps.compare(f"on_network: {name}", 0 * c, 0.0, 0.0, *levels, "NaN or infinite inside its range.")
    if jumps.tail == ():
        x, D = torch.randn(2, len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(t.device)
        c_skip, c_out = (c[:, None] for c in jumps(t, s))
        expected = c_skip * x + c_out * D
        allowed = rtol * ((c_skip * x).abs() + (c_out * D).abs())
        why = "jump must be c_skip x_t + c_out D."
        jumps.compare("jump", precond.jump(x, D, t, s), expected, allowed, t, s, why)


def _check_module(jumps: Jumps, precond: nn.Module) -> None:
    """What happens to a student happens to its preconditioning."""
    t, s = jumps.pairs(some=True)
    before = jumps(t, s)

    def check(what: str, module: nn.Module, why: str) -> None:
        for name, got, expected in zip(before._fields, jumps(t, s, module), before, strict=True):
            jumps.compare(f"{what}: {name}", got, expected, 0.0, t, s, why)

    for name, module in precond.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                where = f"{name}.{key}" if name else key
                raise AssertionError(f"state_dict: the tensor {where} is a plain attribute: call register_buffer.")
    copied = copy.deepcopy(precond)
    check("deepcopy", copied, "A copy computes something else.")
    for tensor in [*copied.parameters(), *copied.buffers()]:
        tensor.data.fill_(1)
    copied.load_state_dict(precond.state_dict())
    check("state_dict", copied, "It does not hold all that the coefficients depend on.")
    for cast in ("half", "bfloat16"):
        check(cast, getattr(copied, cast)(), f".{cast}() of the student rounds its coefficients, which are no weights.")
    _check_device(jumps, copy.deepcopy(precond).to("meta"), t.to("meta"), s.to("meta"))


def _check_device(jumps: Jumps, there: nn.Module, t: Tensor, s: Tensor) -> None:
    """Ask on the meta device, which is any other one; it holds no values to look at, and knows no autocast."""
    try:
        for name, c in jumps(t, s, there)._asdict().items():
            if c.device != t.device:
                raise AssertionError(f"{name} on the device {c.device} for levels on another")
    except AssertionError as error:
        if "device" in str(error):
            raise AssertionError(f"device: all must be where the levels and the module are: {error}") from error


def _check_compiled(jumps: Jumps, backend: str, rtol: float) -> None:
    t, s = jumps.pairs(some=True)
    expected = jumps(t, s)
    torch.compiler.reset()  # else a process compiles one function a few times only
    compiled = torch.compile(lambda t, s: tuple(jumps.precond(t, s)), fullgraph=True, backend=backend)
    try:
        answer = jumps(t, s, compiled)
    except AssertionError as error:
        raise AssertionError(f"compile: not into one graph: {error}") from error
    for name, got, eager in zip(expected._fields, answer, expected, strict=True):
        allowed = rtol * (1 + eager.abs())  # fused arithmetic rounds differently
        jumps.compare(f"compile: {name}", got, eager, allowed, t, s, "Compiled, it computes something else.")
