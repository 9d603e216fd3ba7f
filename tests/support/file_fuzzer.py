"""Damaged and hostile files, and what loading them may do: give something usable, or raise ValueError.

    python tests/support/file_fuzzer.py --runs 20000

With atheris (``pip install atheris``) the damage is guided by the coverage of the package, otherwise it is random. A
file that breaks the rule is left behind, named in the message. `test_hostile_files` runs a part of this.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--random" not in sys.argv:
    try:
        import atheris
    except ImportError:
        sys.argv.append("--random")
    else:
        with atheris.instrument_imports(include=["analytic_precond"]):
            import analytic_precond  # noqa: F401 - instrumented

import numpy as np
import torch
from torch import Tensor

import analytic_precond as ap

Loaded = ap.TeacherStatistics | ap.LeastSquaresPreconditioning | ap.PerModePreconditioning
RESULTS = ("l", "g_rms", "s", "l_stderr", "g_rms_stderr", "s_stderr")


def good_files() -> list[bytes]:
    """Return one small file of each sort."""
    data = torch.linspace(-1, 1, 48).sin().reshape(4, 3, 2, 2)
    pixels = data.reshape(16, 3)
    levels = torch.tensor([20.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.01], dtype=torch.float64)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x.roll(1, -1) + 0.1

    def statistics(samples: Tensor = pixels, levels: Tensor = levels, **options: Any) -> ap.TeacherStatistics:
        options = {"num_samples": 16, "progress": False, "description": "größe 大", **options}
        return ap.estimate_statistics(teacher, samples, levels, **options)

    fit: dict[str, Any] = {"num_trajectories": 8, "progress": False}
    made: list[Loaded] = [
        statistics(),
        statistics(data, intercept=True),
        statistics(levels=levels[:2], num_samples=2),
        statistics(l_method="hutchinson", s_method="jvp"),
        ap.LeastSquaresPreconditioning.fit(teacher, pixels, levels, **fit),
        ap.PerModePreconditioning.fit(teacher, data, levels[::2], **fit),
        ap.PerModePreconditioning.fit(teacher, pixels, levels[::3], basis="pca", **fit),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        contents = []
        for thing in made:
            thing.save(path)
            contents.append(path.read_bytes())
    return contents


# what the files are made of


def split(content: bytes) -> tuple[bytes, bytes]:
    """Return the header and the data of a safetensors file."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def join(header: bytes, data: bytes) -> bytes:
    """Return the file with this header and these data."""
    return struct.pack("<Q", len(header)) + header + data


# damage, each to a file that may be damaged already; what it cannot be done to is left as it is

HOSTILE_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3.0, 0.5, 1e308, -1e308, math.nan, math.inf, 2**31, 2**53, 2**63, 2**64 - 1, 2**64,
    10**12, 10**30, 10**400, "", "0", "stein", "transport", "jvp", "float32", "float64", "half", "\ud800", "\0", "大",
    "x" * 3_000_000, "x" * 5_000_000, [], [[]], {}, {"a": {}}, [0], [1], [1, 1], [3], [2, 2], [3, 2, 2], [-3], [3.0],
    [True], ["3"], [None], [10**12], [10**400], [2**32, 2**32], [2**62, 4], [2] * 70, [2] * 100_000, [10**400] * 2_000,
    [1] * 10_000, [1, 4097], [10**6, 1], list(range(5_000)), "dct", "matrix", "pca",
]  # fmt: skip
HOSTILE_NUMBERS = [
    0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 5e-324, 2.2e-308, 1e-300, 1e-160, 1e-154, 1e16, 2.0**53, 1e100, 1e150, 1e154, 1e160,
    1e200, 1e300, 1.7e308, -1e-300, -1e100, -1e300, -1.7e308, math.nan, math.inf, -math.inf, 79.99999999999999,
]  # fmt: skip
DEEP = "[" * 100_000
DEEP_ENOUGH = ["[" * depth + "]" * depth for depth in (50, 900, 960, 980, 990, 100_000)]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, write bytes, cut, double, move."""
    raw = bytearray(content or b"\0")
    here, size = rng.randrange(len(raw)), rng.choice((1, 1, 4, 8, 64))
    header_end = min(8 + int.from_bytes(raw[:8], "little"), len(raw))
    kind = rng.randrange(9)
    if kind == 0:
        raw[here] ^= 1 << rng.randrange(8)
    elif kind == 1:
        raw[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
    elif kind == 2 and header_end + 8 <= len(raw):  # an exponent
        raw[rng.randrange(header_end + 7, len(raw), 8)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        raw[here : here + size] = rng.randbytes(size)
    elif kind == 4:
        raw[here : here + size] = rng.choice((b"\0", b"\xff", b"[", b'"', b"9")) * size
    elif kind == 5:
        del raw[here : here + rng.choice((1, 8, len(raw)))]
    elif kind == 6:
        raw[here:here] = raw[here : here + size]
    elif kind == 7:
        there = rng.randrange(len(raw))
        raw[here : here + size], raw[there : there + size] = raw[there : there + size], raw[here : here + size]
    else:
        raw += rng.choice((b"\0", rng.randbytes(64), bytes(raw)))
    return bytes(raw)


def lie_about_the_header(content: bytes, rng: random.Random) -> bytes:
    """Give the header another length."""
    length = int.from_bytes(content[:8], "little")
    lies = (0, 1, length - 1, length + 1, length + 8, len(content), 2**22, 2**22 + 1, 10**8, 2**31, 2**63, 2**64 - 1)
    return struct.pack("<Q", rng.choice(lies) % 2**64) + content[8:]


def damage_table(content: bytes, rng: random.Random) -> bytes:
    """Lie about the tensors: their shapes, dtypes, places, names, and what is said beside them."""
    text, data = split(content)
    table = json.loads(text)
    names = [name for name in table if name != "__metadata__"]
    name, kind = rng.choice(names), rng.randrange(9)
    entry = table[name]
    if kind == 0:
        entry["dtype"] = rng.choice(["F32", "F16", "BF16", "I64", "U64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "?", 3])
    elif kind == 1:
        sizes = [0, 1, 2, 3, 10**6, 10**12, 2**32, 2**61, 2**63, 2**64, -1, 1.5, "1", None]
        entry["shape"] = [rng.choice(sizes) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 70)))]
    elif kind == 2:
        entry["shape"] = rng.choice(([1], [])) + entry["shape"][::-1] + rng.choice(([1], [0], []))
    elif kind == 3:
        ends = [0, 8, -8, len(data), len(data) + 8, 2**40, 2**63, 2**64 - 1, *entry["data_offsets"]]
        entry["data_offsets"] = [rng.choice(ends), rng.choice(ends)]
    elif kind == 4:
        table[rng.choice(["x", "levels", "counts", "sums", "mean_data", "matrix", "groups", ""])] = table.pop(name)
    elif kind == 5:
        table[rng.choice(["x", "mean_data", "levels"])] = {"dtype": "F64", "shape": [0, 2**60], "data_offsets": [0, 0]}
    elif kind == 6:
        table["__metadata__"] = rng.choice(
            [{}, {"header": rng.choice(["", "{}", "[]", "null", DEEP])}, [], None, "header"]
        )
    elif kind == 7:
        other = rng.choice(names)
        table[name]["data_offsets"], table[other]["data_offsets"] = table[other]["data_offsets"], entry["data_offsets"]
    else:  # the same name twice
        return join(text[:-1].rstrip() + b"," + json.dumps({name: entry}).encode()[1:], data)
    return join(json.dumps(table).encode(), data)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Lie about how statistics or jumps were made."""
    text, data = split(content)
    table = json.loads(text)
    said = table["__metadata__"]["header"]
    header = json.loads(said)
    field, kind = rng.choice(list(header)), rng.randrange(8)
    if kind < 4:
        header[field] = rng.choice(HOSTILE_VALUES)
        said = json.dumps(header)
    elif kind == 4:
        del header[field]
        said = json.dumps(header)
    elif kind == 5:
        said = said[:-1] + "," + json.dumps({field: rng.choice(HOSTILE_VALUES)})[1:]
    elif kind == 6:
        value = json.dumps(header[field])
        said = said.replace(value, rng.choice([*DEEP_ENOUGH, "9" * 5_000, "1e999", "-", "[" + "0," * 9_999 + "0]"]), 1)
    else:
        place = rng.randrange(len(said))
        said = said[:place] + rng.choice(["", "\\u0000", "[", "}", '"', "\\ud800", "1", " "]) + said[place + 1 :]
    table["__metadata__"]["header"] = said
    return join(json.dumps(table).encode(), data)


def damage_numbers(content: bytes, rng: random.Random) -> bytes:
    """Write numbers that no teacher gives."""
    text, data = split(content)
    table, raw = json.loads(text), bytearray(data)
    entry = table[rng.choice([name for name in table if name != "__metadata__"])]
    start, stop = entry["data_offsets"]
    dtype = {"F64": np.float64, "F32": np.float32, "I64": np.int64}[entry["dtype"]]
    values = np.frombuffer(raw[start:stop], dtype).copy()
    number, kind = rng.choice(HOSTILE_NUMBERS), rng.randrange(6)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts of NaN to integers
        if kind < 2:
            values[rng.randrange(len(values))] = np.asarray(number).astype(dtype)
        elif kind == 2:
            values[rng.randrange(len(values)) :: rng.randrange(1, 8)] = np.asarray(number).astype(dtype)
        elif kind == 3:
            values = (values * 10.0 ** rng.randrange(-300, 300)).astype(dtype)
        elif kind == 4:
            values = rng.choice((values[::-1].copy(), np.sort(values), -values, np.zeros_like(values)))
        else:
            values = np.nextafter(values[0], 0, dtype=float) * np.ones(len(values)) - np.arange(len(values)) * number
            values = values.astype(dtype)
    raw[start:stop] = values.tobytes()
    return join(text, bytes(raw))


def drop_rows(content: bytes, rng: random.Random) -> bytes:
    """Shorten or lengthen the first or second axis of a tensor, data and all."""
    text, data = split(content)
    table = json.loads(text)
    chosen = rng.choice([name for name in table if name != "__metadata__"])
    offset, parts = 0, []
    for name, entry in sorted(
        ((n, e) for n, e in table.items() if n != "__metadata__"), key=lambda p: p[1]["data_offsets"]
    ):
        start, stop = entry["data_offsets"]
        dtype = {"F64": np.float64, "F32": np.float32, "I64": np.int64}[entry["dtype"]]
        values = np.frombuffer(data[start:stop], dtype).reshape(entry["shape"])
        if name == chosen and values.ndim:
            axis = rng.randrange(values.ndim)
            values = np.take(
                values, rng.choice((range(values.shape[axis] - 1), [0], [], [*range(values.shape[axis]), 0])), axis
            )
        parts.append(np.ascontiguousarray(values).tobytes())
        entry["shape"], entry["data_offsets"] = list(values.shape), [offset, offset + len(parts[-1])]
        offset += len(parts[-1])
    return join(json.dumps(table).encode(), b"".join(parts))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    damage_bytes, damage_bytes, lie_about_the_header, damage_table, damage_table, damage_header, damage_header,
    damage_numbers, damage_numbers, damage_numbers, drop_rows,
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the file with one to three damages."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            content = rng.choice(DAMAGES)(content, rng)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
            pass  # too damaged already for this one
    return content


# what may come of it


def load(content: bytes, path: Path) -> Loaded | None:
    """Load a file of whichever sort it seems to be; None if it is refused. Fail if it does anything else."""
    path.write_bytes(content)
    kinds: list[type[Loaded]] = [ap.PerModePreconditioning, ap.LeastSquaresPreconditioning, ap.TeacherStatistics]
    kind = next((kind for kind in kinds if kind.__name__.encode() in content), ap.TeacherStatistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded: Loaded | None = kind.load(path)
        except ValueError as error:
            loaded, message = None, str(error)
        if loaded is None:
            assert len(message) < 2_000, f"too long a message: {message:.200}"
            return None
        assert_usable(loaded)
    return loaded


def assert_usable(loaded: Loaded) -> None:
    """Fail unless all results are numbers, and jumps follow from them or are refused."""
    assert repr(loaded)
    if isinstance(loaded, ap.TeacherStatistics):
        for name in RESULTS:
            values = getattr(loaded, name)
            assert values.shape == loaded.levels.shape, name
            assert bool((values >= 0).all() if name.endswith("stderr") else values.isfinite().all()), name
        try:
            precond: ap.Preconditioning = ap.AnalyticPreconditioning(loaded)
        except ValueError:
            return
    else:
        precond = loaded
    t, s = (torch.tensor(level, dtype=torch.float64) for level in (precond.sigma_max, precond.sigma_min))
    for start, end in ((t, s), (t, t), (s, s), (t, (t * s).sqrt().clamp(s, t))):
        c_skip, c_out = precond(start, end)
        assert bool(c_skip.isfinite().all() & c_out.isfinite().all()), (start, end)
        if start is end:
            assert bool((c_skip == 1).all() & (c_out == 0).all()), start


@contextmanager
def limited_memory(extra: int = 2**30) -> Iterator[None]:
    """Let this process take so many more bytes, and no more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz_at_random(runs: int, seed: int, path: Path) -> int:
    """Load so many damaged files, the good ones in turn; return how many were usable."""
    rng, good, usable = random.Random(seed), good_files(), 0
    with limited_memory():
        for run in range(runs):
            usable += load(damaged(good[run % len(good)], rng), path) is not None
    return usable


def fuzz_guided(runs: int, seed: int, path: Path) -> None:
    """Let atheris choose what to damage further, by the code that it reaches."""

    def mutate(content: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        changed = atheris.Mutate(content, max_size) if rng.random() < 0.2 else damaged(content, rng)
        return changed if len(changed) <= max_size else content

    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(good_files()):
            (Path(folder) / str(number)).write_bytes(content)
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=6000000", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup(
            [sys.argv[0], *options, f"-artifact_prefix={path.parent}/", folder],
            lambda content: load(content, path) and None,
            custom_mutator=mutate,
        )
        atheris.Fuzz()


def main() -> None:
    """Run the fuzzer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="without atheris")
    arguments = parser.parse_args()
    path = Path(tempfile.mkdtemp()) / "hostile.safetensors"
    sys.stdout.write(f"the file at work is {path}\n")
    if arguments.random:
        from archive_fuzzer import fuzz_archives_at_random  # which takes damage_bytes from here

        usable = fuzz_at_random(arguments.runs, arguments.seed, path)
        usable += fuzz_archives_at_random(arguments.runs, arguments.seed, path.with_name("l.npz"))
        sys.stdout.write(f"{2 * arguments.runs} damaged files: {usable} were usable, all others refused\n")
    else:
        fuzz_guided(arguments.runs, arguments.seed, path)


if __name__ == "__main__":
    main()
