"""Files that were made to harm: they give something usable or a ValueError, at once and for little memory."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_fuzzer import fuzz_archives_at_random, good_archives, load_archive
from file_fuzzer import Loaded, fuzz_at_random, good_files, join, load, split

import analytic_precond as ap

# what a loader may take for itself, whatever the file says; a test that fails takes gigabytes
SMALL = 200 * 2**20


@pytest.fixture(scope="module", name="good")
def good_ones() -> dict[str, bytes]:
    names = ("pixels", "images with intercept", "one pair", "derivatives", "least squares", "dct", "pca")
    return dict(zip(names, good_files(), strict=True))


@pytest.fixture(name="path")
def path_of_a_file(tmp_path: Path) -> Path:
    return tmp_path / "hostile.safetensors"


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if the process's peak grows by much more than it was."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < SMALL


def change(content: bytes, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """Edit a file's table of tensors and the header in it."""
    text, data = split(content)
    table = json.loads(text)
    header = json.loads(table["__metadata__"]["header"])
    edit(table, header)
    table["__metadata__"]["header"] = json.dumps(header)
    return join(json.dumps(table).encode(), data)


def test_good_files_are_good(good: dict[str, bytes], path: Path) -> None:
    assert all(load(content, path) is not None for content in good.values())


@pytest.mark.long
@pytest.mark.timeout(300)
def test_damaged_files_are_refused_or_usable(path: Path) -> None:
    usable = fuzz_at_random(3000, 0, path)  # fails within; tests/support/file_fuzzer.py does more of it
    assert 100 < usable < 2000  # some damage is in places that do not matter


@pytest.mark.long
@pytest.mark.timeout(300)
def test_damaged_archives_are_refused_or_usable(tmp_path: Path) -> None:
    assert all(load_archive(content, tmp_path / "l.npz") for content in good_archives())
    usable = fuzz_archives_at_random(2000, 0, tmp_path / "l.npz")
    assert 30 < usable < 1000


@pytest.mark.long
@pytest.mark.timeout(60)
def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    levels = 2**29 // (4 * 3 * 64 * 64)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({levels}, 3, 64, 64)}}".ljust(117) + "\n"
    zeros = bytes(2**20)
    for file, names in (("l.npz", "l"), ("sb.npz", "sb")):
        with zipfile.ZipFile(tmp_path / file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in names:
                with archive.open(f"{name}.npy", "w") as member:
                    member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
                    for _ in range(levels * 3 * 64 * 64 * 4 // len(zeros) + 1):
                        member.write(zeros)
    assert (tmp_path / "l.npz").stat().st_size < 2**22
    with little_memory(), pytest.raises(ValueError, match="its arrays may have 268435456 bytes, got 5"):
        ap.load_ems(tmp_path)


# what is no regular file


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [ap.TeacherStatistics, ap.LeastSquaresPreconditioning, ap.PerModePreconditioning])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: type[Loaded]) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=rf"got {place}, .*no regular file"):
            kind.load(place)
    for place in (tmp_path / "loop", tmp_path / "dangling", tmp_path / ("x" * 300), tmp_path / "pipe" / "x"):
        with pytest.raises(FileNotFoundError, match="check the path"):
            kind.load(place)


def test_a_link_to_a_file_is_followed(good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(good["pixels"])
    (tmp_path / "link").symlink_to("file")
    assert ap.TeacherStatistics.load(tmp_path / "link").header.sample_shape == (3,)


# sizes


@pytest.mark.timeout(60)
def test_huge_files_are_refused_without_being_read(good: dict[str, bytes], path: Path) -> None:
    size = 100 * 10**9  # holes, which take no place on disk
    levels = {"dtype": "F64", "shape": [size // 8], "data_offsets": [0, size]}
    consistent = join(json.dumps({"levels": levels}).encode(), b"")
    with little_memory():
        for start in (b"", good["pixels"], consistent):
            path.write_bytes(start)
            os.truncate(path, size if start != consistent else len(start) + size)
            with pytest.raises(ValueError, match="damaged"):
                ap.TeacherStatistics.load(path)


def grow_levels(table: dict[str, Any], header: dict[str, Any]) -> None:
    """Declare half a billion levels, at the end of the file, where there are seven."""
    end = max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
    table["old"] = table["levels"]  # whose place must not stay empty
    table["levels"] = {"dtype": "F64", "shape": [2**29], "data_offsets": [end, end + 2**32]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["pixels", "images with intercept", "least squares", "dct", "pca"])
def test_shapes_are_compared_before_anything_is_read(good: dict[str, bytes], path: Path, name: str) -> None:
    content = change(good[name], grow_levels)
    path.write_bytes(content)
    os.truncate(path, len(content) + 2**32)
    kind = ap.TeacherStatistics if name in ("pixels", "images with intercept") else ap.LeastSquaresPreconditioning
    kind = ap.PerModePreconditioning if name in ("dct", "pca") else kind
    with little_memory(), pytest.raises(ValueError, match=r"(sums|control) must be .* of shape .*536870912, .* got"):
        kind.load(path)


def test_tensors_that_nobody_asked_for_are_not_read(good: dict[str, bytes], path: Path) -> None:
    def add(table: dict[str, Any], header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
        table["more"] = {"dtype": "U8", "shape": [2**32], "data_offsets": [end, end + 2**32]}

    content = change(good["pixels"], add)
    path.write_bytes(content)
    os.truncate(path, len(content) + 2**32)
    with little_memory():
        assert ap.TeacherStatistics.load(path).num_samples == 16


@pytest.mark.parametrize("shape", [[10**12], [2**61, 7], [2**32, 2**32, 1]])
def test_giant_shapes_of_small_data_are_refused(good: dict[str, bytes], path: Path, shape: list[int]) -> None:
    content = change(good["pixels"], lambda table, header: table["sums"].update(shape=shape))
    with little_memory():
        assert load(content, path) is None


OVERFLOWING = [[2**32, 2**32], [2**62, 4], [2] * 70, [10**400] * 5_000, [2] * 1_000_000]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in ("pixels", "least squares") for shape in OVERFLOWING),
        *(
            (name, shape)
            for name in ("images with intercept", "dct", "pca")
            for shape in [*OVERFLOWING, [10**12], [10**6, 1], [1, 4097]]
        ),
    ],
)
def test_giant_sample_shapes_are_refused(good: dict[str, bytes], path: Path, name: str, shape: list[int]) -> None:
    with little_memory():
        assert load(change(good[name], lambda table, header: header.update(sample_shape=shape)), path) is None


def test_a_cosine_basis_is_no_larger_than_other_bases(good: dict[str, bytes], path: Path) -> None:
    """A file of 80 kB must not ask for a matrix of 800 MB."""

    def widen(table: dict[str, Any], header: dict[str, Any]) -> None:
        size = 10_000
        header["sample_shape"] = [1, size]
        first, last = table["groups"]["data_offsets"]
        for name, entry in table.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= last:
                entry["data_offsets"] = [place + 8 * size - (last - first) for place in entry["data_offsets"]]
        table["groups"] = {"dtype": "I64", "shape": [size], "data_offsets": [first, first + 8 * size]}

    text, _ = split(change(good["dct"], widen))
    data = split(good["dct"])[1]
    first, last = json.loads(split(good["dct"])[0])["groups"]["data_offsets"]
    path.write_bytes(join(text, data[:first] + bytes(80_000) + data[last:]))
    with little_memory(), pytest.raises(ValueError, match=r"up to 4096 in each direction"):
        ap.PerModePreconditioning.load(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("flood", ["tensors", "nesting", "lists", "description"])
def test_a_flood_in_the_header_is_refused(good: dict[str, bytes], path: Path, flood: str) -> None:
    def edit(table: dict[str, Any], header: dict[str, Any]) -> None:
        if flood == "tensors":
            empty = {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}
            table.update({f"{number}": empty for number in range(100_000)})
        elif flood == "description":
            header["description"] = "x" * 2**23
        else:
            header["seeds"] = [[]] * 3_000_000 if flood == "lists" else "deep"

    content = change(good["pixels"], edit)
    if flood == "nesting":
        text, data = split(content)
        content = join(text.replace(b'\\"deep\\"', b"[" * 2**20 + b"]" * 2**20), data)
    path.write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=r"damaged"):
        ap.TeacherStatistics.load(path)


# what is large, and as it should be


def make(levels: int, size: tuple[int, ...], **header: Any) -> ap.TeacherStatistics:
    """Return statistics of white data: l = 1/2 everywhere, and no remainder."""
    grid = ap.log_noise_levels(levels)
    sums = torch.ones(4, levels, 7, dtype=torch.float64)
    sums[..., 0] = 0.5
    said = {"l_method": "stein", "s_method": "transport", "seeds": (0,), "precision": "float32", "description": "white"}
    mean = torch.linspace(-1, 1, math.prod(size), dtype=torch.float64).reshape(size)
    return ap.TeacherStatistics(
        grid, torch.ones(4, dtype=torch.float64), sums, ap.StatisticsHeader(**{**said, "sample_shape": size, **header}),
        mean.expand(levels, *size).clone(), mean,
    )  # fmt: skip


def test_the_usual_size_loads(path: Path) -> None:
    make(120, (3, 64, 64)).save(path)  # 12 MB
    loaded = ap.TeacherStatistics.load(path)
    assert loaded.mean_denoised is not None
    assert loaded.mean_denoised.shape == (120, 3, 64, 64)
    torch.testing.assert_close(loaded.l, torch.full_like(loaded.l, 0.5))


def test_a_long_description_is_kept_and_one_without_end_refused(path: Path) -> None:
    long = "ö" * 300_000  # six bytes each in JSON
    make(2, (1,), description=long).save(path)
    assert ap.TeacherStatistics.load(path).header.description == long
    with pytest.raises(ValueError, match=r"4194304 of them for its header, got"):
        make(2, (1,), description=8 * long).save(path)
    assert ap.TeacherStatistics.load(path).header.description == long
    assert os.listdir(path.parent) == [path.name]


def test_seeds_of_very_many_runs_are_kept(path: Path) -> None:
    seeds = tuple(range(2**64 - 50_000, 2**64))
    make(2, (1,), seeds=seeds).save(path)
    assert ap.TeacherStatistics.load(path).header.seeds == seeds


# consistency


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("pixels", "seeds", [2**64], "'seeds' must be a list of integers from 0"),
        ("pixels", "sample_shape", [1.0], "'sample_shape' must hold positive integers"),
        ("least squares", "num_trajectories", 0, "there must be trajectories"),
        ("least squares", "seed", -1, "seed below"),
        ("least squares", "sigma_data", math.nan, "sigma_data must be positive"),
        ("least squares", "sigma_data", 1, "'sigma_data' must be a number"),
        ("dct", "sample_shape", [12], r"basis 'dct' needs images \(C, H, W\) or \(H, W\)"),
        ("dct", "sample_shape", [3, 1, 2, 2], "basis 'dct' needs images"),
    ],
)
def test_headers_that_do_not_fit(
    good: dict[str, bytes], path: Path, name: str, field: str, value: object, message: str
) -> None:
    path.write_bytes(change(good[name], lambda table, header: header.update({field: value})))
    kinds = {"pixels": ap.TeacherStatistics, "dct": ap.PerModePreconditioning}
    with pytest.raises(ValueError, match=message):
        kinds.get(name, ap.LeastSquaresPreconditioning).load(path)


def test_channels_are_not_mixed_where_there_are_none(good: dict[str, bytes], path: Path) -> None:
    path.write_bytes(change(good["dct"], lambda t, header: header.update(sample_shape=[6, 2], mix_channels=True)))
    with pytest.raises(ValueError, match="with channels to mix them"):
        ap.PerModePreconditioning.load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("pca", "matrix", 0.5, "orthonormal columns"),
        ("dct", "control", 3e38, "must be coefficients of jumps, got 3e\\+38"),
        ("least squares", "control", 1e200, "must be coefficients of jumps, got 1e\\+200"),
        ("least squares", "c_out_stderr", math.nan, "must not be negative or NaN"),
        ("least squares", "c_skip_stderr", -1.0, "must not be negative or NaN"),
        ("pixels", "levels", 1e-307, "must span a ratio that float64 holds, got 20.0 to 1e-307"),
    ],
)
def test_numbers_that_do_not_fit(
    good: dict[str, bytes], path: Path, name: str, tensor: str, value: float, message: str
) -> None:
    text, data = split(good[name])
    entry = json.loads(text)[tensor]
    _, stop = entry["data_offsets"]
    number = torch.tensor([value], dtype={"F64": torch.float64, "F32": torch.float32}[entry["dtype"]]).numpy().tobytes()
    path.write_bytes(join(text, data[: stop - len(number)] + number + data[stop:]))
    kinds = {"pixels": ap.TeacherStatistics, "least squares": ap.LeastSquaresPreconditioning}
    kind = kinds.get(name, ap.PerModePreconditioning)
    with pytest.raises(ValueError, match=message):
        kind.load(path)
