r"""The command line: statistics of a teacher for people who do not want to write Python (docs/command-line.md)."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..data.memory import BatchSize
from ..estimation.estimate import estimate_statistics
from ..statistics.teacher_statistics import L_METHODS, S_METHODS
from .commands import compare, estimate, plot, show

_PROGRAM = "python -m analytic_precond"
_ERROR, _INTERRUPTED, _PIPE_CLOSED = 2, 130, 141  # the last two as shells count signals
_EXAMPLES = f"""\
examples:
  {_PROGRAM} estimate teachers:cifar10 --data images.npy --output teacher.safetensors
  {_PROGRAM} show teacher.safetensors
  {_PROGRAM} plot teacher.safetensors --output teacher.png
  {_PROGRAM} compare teacher.safetensors another.safetensors

exit codes: 0 done, 1 compared and found to differ, 2 an error, 130 interrupted, 141 nobody reads stdout on
"""

_ESTIMATE = f"""\
examples:
  # cifar10() in teachers.py in this folder returns the denoiser; images are floats in its range
  {_PROGRAM} estimate teachers:cifar10 --data images.npy --output teacher.safetensors
  # cifar10() returns (denoiser, data)
  {_PROGRAM} estimate teachers.py:cifar10 --output teacher.safetensors
  # interrupted, the same command goes on
  {_PROGRAM} estimate teachers:cifar10 --data teachers:images --output teacher.safetensors \\
      --device cuda --batch-size auto --resume teacher.resume
"""

_SHOW = f"""\
examples:
  {_PROGRAM} show teacher.safetensors
  {_PROGRAM} show teacher.safetensors --levels 80 1 0.002
  {_PROGRAM} show teacher.safetensors --json > teacher.json
"""

_PLOT = f"""\
examples:
  {_PROGRAM} plot teacher.safetensors --output teacher.png
  {_PROGRAM} plot small.safetensors large.safetensors --output both.pdf
  {_PROGRAM} plot teacher.safetensors fitted.safetensors --what coefficients --from 80 1 --output jumps.png
"""

_COMPARE = f"""\
examples:
  {_PROGRAM} compare teacher.safetensors another.safetensors && echo they agree
  {_PROGRAM} compare teacher.safetensors another.safetensors --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's words, and return the exit code; results go to stdout, else stderr."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, io.UnsupportedOperation):  # or Python flushes into the pipe once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt as interruption:
        sys.stderr.write(f"\ninterrupted{_kept(getattr(options, 'resume', None), str(interruption))}\n")
        return _INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}{_place(error)}\n")
    except Exception:
        traceback.print_exc()
    return _ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Preconditioning for distilling diffusion models: the coefficients of a trained teacher.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"analytic-precond {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, words, run, add_arguments, examples in (
        ("estimate", "TEACHER [--data DATA] --output FILE [options]", estimate, _add_estimate, _ESTIMATE),
        ("show", "FILE [--levels T [T ...]] [--json]", show, _add_show, _SHOW),
        ("plot", "FILE [FILE ...] --output PICTURE [options]", plot, _add_plot, _PLOT),
        ("compare", "FILE FILE [--json]", compare, _add_compare, _COMPARE),
    ):
        text = (run.__doc__ or "").rstrip(".")
        command = commands.add_parser(
            name,
            usage=f"{_PROGRAM} {name} {words}",
            help=text[0].lower() + text[1:],
            description=f"{text}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        add_arguments(command)
    return parser


def _add_estimate(command: argparse.ArgumentParser) -> None:
    default = {name: p.default for name, p in inspect.signature(estimate_statistics).parameters.items()}
    add = command.add_argument
    add(
        "teacher",
        metavar="TEACHER",
        help="package.module:function or path/to/file.py:function, called without arguments: it returns the denoiser, "
        "any callable D(x, t), or (denoiser, data)",
    )
    add(
        "--data",
        metavar="DATA",
        help="clean data in the teacher's range: a .npy, .npz or .safetensors file of floats (N, ...), FILE:NAME where "
        "it holds several; or module:function, which returns a tensor, a Dataset, a DataLoader or batches",
    )
    add("--output", metavar="FILE", required=True, help="the file to write, by custom .safetensors")
    add(
        "--levels",
        metavar="T",
        type=_noise_level("name the teacher before --levels"),
        nargs="+",
        help="decreasing noise levels, instead of a grid uniform in ln t",
    )
    add("--num-levels", metavar="N", type=int, help="number of levels of the grid (default: 120)")
    add("--sigma-min", metavar="T", type=float, help="smallest noise level of the grid (default: 0.002)")
    add("--sigma-max", metavar="T", type=float, help="largest noise level of the grid (default: 80)")
    for name, kind, text in (
        ("num_samples", int, "noisy samples per level, two for each clean one"),
        ("batch_size", _batch_size, 'largest batch that the teacher sees, or "auto": as memory allows'),
        ("seed", int, "seed of noise and data order"),
    ):
        add(
            f"--{name.replace('_', '-')}",
            metavar="N",
            type=kind,
            default=default[name],
            help=f"{text} (default: %(default)s)",
        )
    for name, known in (("l_method", L_METHODS), ("s_method", S_METHODS)):
        text = f"estimator of {name[0]}: {', '.join(known)} (default: %(default)s)"
        add(f"--{name.replace('_', '-')}", metavar="NAME", choices=known, default=default[name], help=text)
    add("--intercept", action="store_true", help="regress D on (x, 1) instead of x")
    add("--per-element", action="store_true", help="keep the sums of each element of a sample too")
    add("--device", metavar="NAME", help="where the teacher runs, e.g. cuda; a network is moved there")
    add("--resume", metavar="PATH", help="a file that keeps what is finished: interrupted, the same command goes on")
    add("--json", action="store_true", help="print the results as JSON")


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="statistics, or a fitted preconditioning")
    command.add_argument(
        "--levels", metavar="T", type=_noise_level("name files before --levels"), nargs="+",
        help="only the levels nearest to these (default: all)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", metavar="FILE", nargs="+", help="statistics; for coefficients also fitted ones")
    command.add_argument("--output", metavar="PICTURE", required=True, help="the picture to write: .png, .pdf, .svg")
    command.add_argument(
        "--what", choices=("statistics", "coefficients"), default="statistics",
        help="l, s and the remainder, or the coefficients c_skip and c_out of jumps (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--from", dest="start", metavar="T", type=_noise_level("name files before --from"), nargs="+",
        help="noise levels that jumps start from (default: 80 5 0.5)",
    )  # fmt: skip


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("first", metavar="FILE", help="statistics")
    command.add_argument("second", metavar="FILE", help="statistics at the same noise levels")
    command.add_argument("--json", action="store_true", help="print JSON")


def _batch_size(text: str) -> BatchSize:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'expected a whole number or "auto", got {text!r}') from error


def _noise_level(advice: str) -> Callable[[str], float]:
    """Return a reader of noise levels. What stands after them is taken for one, too."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a noise level, got {text!r}: {advice}") from error
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"a noise level must be positive and finite, got {text}")
        return value

    return read


def _kept(resume: str | None, message: str) -> str:
    """Say what an interruption leaves behind. The message is the library's, from the first batch on."""
    if resume is None:
        return ", nothing is kept (estimate has --resume)"
    if not os.path.exists(resume):
        return f" before the first batch was finished: nothing is kept in {resume} yet"
    return f": {message or f'run the same again to go on from {resume}'}"


def _place(error: Exception) -> str:
    """Say where an error comes from, if that is not this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    if not frames or Path(__file__).parents[1] in Path(frames[-1].filename).parents:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
