"""Files of statistics: they come back bit for bit, and anything else is refused without being executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

import analytic_precond as ap

LEVELS = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
DATA = torch.linspace(-1, 1, 60).sin().reshape(20, 3)
RESULTS = ("l", "l_stderr", "g_rms", "g_rms_stderr", "s", "s_stderr")
PARTS = ("levels", "counts", "sums", "mean_denoised", "mean_data")


def estimate(data: Tensor = DATA, **options: Any) -> ap.TeacherStatistics:
    options = {"num_samples": 40, "progress": False, "description": "a teacher", **options}
    return ap.estimate_statistics(lambda x, t: torch.tanh(x) + 0.1, data, LEVELS, **options)


def assert_equal_bits(a: ap.TeacherStatistics, b: ap.TeacherStatistics) -> None:
    assert a.header == b.header
    for name in PARTS + RESULTS:
        left, right = getattr(a, name), getattr(b, name)
        if left is None:
            assert right is None
        else:
            assert left.dtype == right.dtype
            assert left.numpy().tobytes() == right.numpy().tobytes()


class Parts(NamedTuple):
    """A file taken apart, to be put together wrongly."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def take_apart(path: Path) -> Parts:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return Parts(json.loads(metadata["header"]), safetensors.torch.load(path.read_bytes()))


def put_together(path: Path, parts: Parts) -> None:
    safetensors.torch.save_file(parts.tensors, path, {"header": json.dumps(parts.header)})


def load(path: Path, content: bytes) -> ap.TeacherStatistics:
    path.write_bytes(content)
    return ap.TeacherStatistics.load(path)


@pytest.fixture(scope="module", name="content")
def content_of_a_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "a.safetensors"
    estimate().save(path)
    return path.read_bytes()


@pytest.fixture(name="path")
def path_of_a_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(content)
    return path


SOURCES: dict[str, Callable[[], ap.TeacherStatistics]] = {
    "default": estimate,
    "intercept": lambda: estimate(intercept=True),
    "derivatives": lambda: estimate(l_method="hutchinson", s_method="jvp", seed=2**63),
    "one-pair": lambda: estimate(num_samples=2),  # its standard errors are infinite
    "merged": lambda: ap.merge_statistics([estimate(seed=seed, intercept=True) for seed in (3, 1)]),
    "scalar-samples": lambda: estimate(DATA[:, 0], intercept=True),
    "images": lambda: estimate(DATA.reshape(5, 3, 2, 2), intercept=True),
    "odd-description": lambda: estimate(description='EDM "big"\n\\ größe 大 \x00 \ud800'),
    "empty-description": lambda: estimate(description=""),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_statistics_come_back_bit_for_bit(tmp_path: Path, make: Callable[[], ap.TeacherStatistics]) -> None:
    statistics, path = make(), tmp_path / "teacher.safetensors"
    statistics.save(path)
    assert_equal_bits(statistics, ap.TeacherStatistics.load(path))
    assert_equal_bits(statistics, ap.TeacherStatistics.load(str(path)))


def test_the_intercept_comes_back(tmp_path: Path) -> None:
    statistics = estimate(intercept=True)
    statistics.save(tmp_path / "a")
    loaded = ap.TeacherStatistics.load(tmp_path / "a")
    assert statistics.intercept is not None
    assert loaded.intercept is not None
    assert torch.equal(statistics.intercept, loaded.intercept)


@pytest.mark.parametrize("intercept", [False, True])
def test_equal_statistics_make_equal_files(tmp_path: Path, intercept: bool) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    estimate(intercept=intercept).save(first)
    estimate(intercept=intercept).save(second)
    ap.TeacherStatistics.load(first).save(third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    estimate(intercept=intercept, seed=1).save(second)
    assert first.read_bytes() != second.read_bytes()


def test_a_preconditioning_from_the_file_is_the_same(path: Path) -> None:
    direct, loaded = (ap.AnalyticPreconditioning(s) for s in (estimate(), ap.TeacherStatistics.load(path)))
    assert direct(2.0, 0.3) == loaded(2.0, 0.3)


def test_any_safetensors_reader_reads_the_file(path: Path) -> None:
    statistics, (header, tensors) = estimate(seed=0), take_apart(path)
    expected = {
        "l_method": "stein",
        "s_method": "transport",
        "seeds": [0],
        "sample_shape": [3],
        "description": "a teacher",
        "num_samples": 40,
        "num_levels": 4,
    }
    assert {name: header[name] for name in expected} == expected
    assert "TeacherStatistics" in header["kind"]
    assert any(character.isdigit() for character in header["kind"])  # the version of the layout
    assert sorted(tensors) == ["counts", "levels", "sums"]
    assert torch.equal(tensors["levels"], LEVELS)
    assert torch.equal(tensors["sums"], statistics.sums)


def test_a_file_is_replaced_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replaced = path.read_bytes(), []
    os_replace = os.replace

    def watched(source: Any, destination: Any) -> None:
        assert path.read_bytes() == before  # untouched until the new file is complete
        assert ap.TeacherStatistics.load(source).header.seeds == (7,)
        assert Path(source).parent == path.parent  # a rename within one folder is atomic
        replaced.append(Path(destination))
        os_replace(source, destination)

    monkeypatch.setattr(os, "replace", watched)
    estimate(seed=7).save(path)
    assert replaced == [path]
    assert ap.TeacherStatistics.load(path).header.seeds == (7,)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("results_first", [False, True])
def test_loaded_statistics_do_not_hang_on_the_file(path: Path, results_first: bool) -> None:
    """Somebody else may copy another file over it (not atomically, as cp does) or delete it."""
    loaded = ap.TeacherStatistics.load(path)
    if results_first:
        loaded.l  # noqa: B018 - computed from the sums when first asked for
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal_bits(loaded, estimate())
    path.unlink()
    assert_equal_bits(loaded, estimate())


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a .*file, got no file at .*nothing.*: check the path"):
        ap.TeacherStatistics.load(tmp_path / "nothing")


NOT_STATISTICS = r"expected a TeacherStatistics.* file as written by save, got .*{}.*: write it again or fetch it again"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=NOT_STATISTICS.format(tmp_path.name)):
        ap.TeacherStatistics.load(tmp_path)


def test_a_file_cut_anywhere_is_refused(path: Path, content: bytes) -> None:
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    lengths = {*range(16), header_end - 1, header_end, header_end + 1, *range(0, len(content), 37), len(content) - 1}
    for length in sorted(lengths):
        with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
            load(path, content[:length])


def test_a_longer_file_is_refused(path: Path, content: bytes) -> None:
    for tail in (b"\0", content):
        with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
            load(path, content + tail)


def test_random_bytes_are_refused(path: Path) -> None:
    rng = random.Random(0)
    for _ in range(200):
        noise = rng.randbytes(rng.randrange(1, 2000))
        with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
            load(path, noise)


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**32, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(path: Path, content: bytes, length: int) -> None:
    with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
        load(path, struct.pack("<Q", length) + content[8:])


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def zip_pickle(payload: object, path: Path) -> None:
    torch.save({"levels": LEVELS, "payload": payload}, path)


def legacy_pickle(payload: object, path: Path) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def plain_pickle(payload: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("write", [plain_pickle, zip_pickle, legacy_pickle])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, write: Callable[[object, Path], None]) -> None:
    trace, path = tmp_path / "executed", tmp_path / "teacher.pt"  # torch.load goes by the name
    write(Payload(trace), path)
    with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
        ap.TeacherStatistics.load(path)
    assert not trace.exists()

    # the payload is live: an unpickler would have left its trace
    if write is plain_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_pickle_in_the_header_is_not_executed(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    header, tensors = take_apart(path)
    put_together(path, Parts({**header, "description": pickle.dumps(Payload(trace), 0).decode()}, tensors))
    assert "executed" in ap.TeacherStatistics.load(path).header.description
    assert not trace.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"header": "{}"},
        {"header": "[]"},
        {"header": "null"},
        {"header": ""},
        {"header": "{"},
        {"header": "[" * 100_000},
        {"header": "9" * 10_000},
        {"header": '{"kind": "TeacherStatistics"}'},
        {"header": '{"kind": ["TeacherStatistics 1"]}'},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_another_safetensors_file_is_refused(path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file(take_apart(path).tensors, path, metadata)
    with pytest.raises(ValueError, match=NOT_STATISTICS.format(path.name)):
        ap.TeacherStatistics.load(path)


def test_a_later_version_is_refused_and_named(path: Path) -> None:
    header, tensors = take_apart(path)
    later = "".join("9" if character.isdigit() else character for character in header["kind"])
    put_together(path, Parts({**header, "kind": later}, tensors))
    with pytest.raises(ValueError, match=rf"got .*{later}"):
        ap.TeacherStatistics.load(path)


def change(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return changed


NAN, INF = float("nan"), float("inf")
DAMAGED_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "levels-missing": ("levels", lambda v: None, r"\['levels'\] are missing"),
    "counts-missing": ("counts", lambda v: None, r"\['counts'\] are missing"),
    "sums-missing": ("sums", lambda v: None, r"\['sums'\] are missing"),
    "levels-shorter": ("levels", lambda v: v[:-1].clone(), r"sums must be float64 of shape \(10, 3, 7\), got"),
    "levels-2-d": ("levels", lambda v: v[None], r"levels must be 1-D"),
    "levels-0-d": ("levels", lambda v: v[0].clone(), r"levels must be 1-D"),
    "levels-empty": ("levels", lambda v: v[:0].clone(), r"levels must be 1-D with at least 2"),
    "levels-increasing": ("levels", lambda v: v.flip(0), r"strictly decreasing"),
    "levels-nan": ("levels", change(1, NAN), r"levels must be finite"),
    "levels-negative": ("levels", change(3, -0.1), r"got -0\.1 at index 3"),
    "levels-float32": ("levels", lambda v: v.float(), r"levels must be float64.*got torch\.float32"),
    "levels-int": ("levels", lambda v: v.long(), r"levels must be .*got torch\.int64"),
    "levels-bool": ("levels", lambda v: v > 0, r"levels must be .*got torch\.bool"),
    "levels-float8": ("levels", lambda v: v.to(torch.float8_e4m3fn), r"levels must be .*got torch\.float8_e4m3fn"),
    "counts-0-d": ("counts", lambda v: v[0].clone(), r"counts must be|0-d"),
    "counts-2-d": ("counts", lambda v: v[:, None], r"counts must be float64 of shape \(10,\), got .*\(10, 1\)"),
    "counts-longer": ("counts", lambda v: torch.cat([v, v]), r"sums must be .*\(20, 4, 7\), got"),
    "counts-empty": ("counts", lambda v: v[:0].clone(), r"sums must be .*\(0, 4, 7\), got|no samples"),
    "counts-float32": ("counts", lambda v: v.float(), r"counts must be float64 .*got torch\.float32"),
    "counts-zero": ("counts", change(0, 0.0), r"counts .*must be positive"),
    "counts-negative": ("counts", change(0, -2.0), r"counts .*must be positive"),
    "counts-fractional": ("counts", change(0, 1.5), r"counts must be .*got \[1\.5"),
    "counts-nan": ("counts", change(0, NAN), r"counts must be finite"),
    "counts-absurd": ("counts", change(0, 1e300), r"counts must be .*got \[1e\+300"),
    "sums-2-d": ("sums", lambda v: v[0].clone(), r"sums must be float64 of shape \(10, 4, 7\), got .*\(4, 7\)"),
    "sums-transposed": ("sums", lambda v: v.transpose(0, 1).contiguous(), r"sums must be float64 of shape"),
    "sums-nan": ("sums", change(5, NAN), r"sums must be finite, got 1 NaN or infinite of 280 values"),
    "sums-inf": ("sums", change(5, -INF), r"sums must be finite, got 1 NaN or infinite of 280 values"),
    "sums-no-norm": ("sums", change(1, -1.0), r"probe norms must be positive"),
    "sums-half": ("sums", lambda v: v.half(), r"sums must be float64 .*got torch\.float16"),
    "sums-overflow": ("sums", change(0, 1e200), r"overflow|finite"),  # l^2 <x, x> is infinite
}


@pytest.mark.parametrize(("name", "damage", "match"), DAMAGED_TENSORS.values(), ids=DAMAGED_TENSORS.keys())
def test_damaged_tensors_are_refused(
    path: Path, name: str, damage: Callable[[Tensor], Tensor | None], match: str
) -> None:
    header, tensors = take_apart(path)
    changed = damage(tensors.pop(name))
    put_together(path, Parts(header, tensors if changed is None else {**tensors, name: changed}))
    with pytest.raises(ValueError, match=rf"(?s){path.name}.*({match})"):
        ap.TeacherStatistics.load(path)


@pytest.mark.parametrize("name", ["mean_denoised", "mean_data"])
@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "float32"])
def test_a_damaged_intercept_is_refused(path: Path, name: str, damage: str) -> None:
    estimate(intercept=True).save(path)
    header, tensors = take_apart(path)
    mean = tensors.pop(name)
    if damage != "missing":
        tensors[name] = {"shape": mean[..., :-1].clone(), "nan": mean * NAN, "float32": mean.float()}[damage]
    put_together(path, Parts(header, tensors))
    with pytest.raises(ValueError, match=rf"{path.name}.*{name} must be (float64 of shape .*got|finite)"):
        ap.TeacherStatistics.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("l_method", None),
        ("l_method", "none-of-them"),
        ("l_method", ["stein"]),
        ("s_method", 3),
        ("s_method", "stein"),
        ("description", None),
        ("description", {"name": "EDM"}),
        ("seeds", 0),
        ("seeds", "0"),
        ("seeds", [True]),
        ("seeds", [0.5]),
        ("seeds", [-1]),
        ("seeds", {"0": 1}),
        ("sample_shape", 3),
        ("sample_shape", None),
        ("sample_shape", [3.0]),
        ("sample_shape", ["3"]),
        ("sample_shape", [-3]),
        ("sample_shape", [0]),  # samples without elements have no RMS
        ("sample_shape", [10**30]),  # no tensor has that many elements
        ("sample_shape", [2**32, 2**32]),
    ],
)
def test_damaged_header_fields_are_refused_by_name(path: Path, field: str, value: object) -> None:
    header, tensors = take_apart(path)
    put_together(path, Parts({**header, field: value}, tensors))
    with pytest.raises(ValueError, match=rf"{path.name}.*{field}"):
        ap.TeacherStatistics.load(path)


@pytest.mark.parametrize("field", ["l_method", "s_method", "description", "seeds", "sample_shape"])
def test_missing_header_fields_are_refused_by_name(path: Path, field: str) -> None:
    header, tensors = take_apart(path)
    del header[field]
    put_together(path, Parts(header, tensors))
    with pytest.raises(ValueError, match=rf"{path.name}.*{field}"):
        ap.TeacherStatistics.load(path)


def test_statistics_check_their_parts_when_built() -> None:
    good = estimate()
    with pytest.raises(ValueError, match=r"sums must be float64 of shape \(10, 3, 7\), got .*\(10, 4, 7\)"):
        replace(good, levels=good.levels[1:])
    with pytest.raises(ValueError, match=r"mean_data must be float64 of shape \(3,\), got nothing"):
        replace(good, mean_denoised=torch.zeros(4, 3, dtype=torch.float64))


def assert_usable(statistics: ap.TeacherStatistics) -> None:
    """Fail unless every result is a number; the tests' setting turns numpy's warnings into errors."""
    assert statistics.num_samples > 0
    for name in RESULTS:
        result = getattr(statistics, name)
        assert result.shape == statistics.levels.shape
        assert not result.isnan().any()
        assert (result >= 0).all() if name.endswith("stderr") else result.isfinite().all()


def flip_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_header_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << rng.randrange(8)


def flip_exponent_bit(content: bytearray, rng: random.Random) -> None:
    """Flip a high bit of a float64, the header being a multiple of eight bytes: the values most absurd."""
    first = 8 + struct.unpack("<Q", content[:8])[0]
    content[rng.randrange(first + 7, len(content), 8)] ^= 1 << rng.randrange(8)


def write_byte(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.randrange(256)


def swap_blocks(content: bytearray, rng: random.Random) -> None:
    a, b, size = rng.randrange(len(content)), rng.randrange(len(content)), rng.randrange(1, 64)
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


MUTATIONS = [flip_bit, flip_header_bit, flip_exponent_bit, write_byte, swap_blocks]


@pytest.mark.parametrize("mutate", MUTATIONS)
@pytest.mark.parametrize("intercept", [False, True])
def test_a_mutated_file_is_refused_or_usable(
    tmp_path: Path, intercept: bool, mutate: Callable[[bytearray, random.Random], None]
) -> None:
    path, rng = tmp_path / "teacher.safetensors", random.Random(0)
    estimate(intercept=intercept).save(path)
    original, refused = path.read_bytes(), 0
    for _ in range(100):
        mutated = bytearray(original)
        mutate(mutated, rng)
        try:
            statistics = load(path, bytes(mutated))
        except ValueError:
            refused += 1
        else:
            assert_usable(statistics)
    assert refused > 0
    assert_usable(load(path, original))


def test_loading_reads_without_writing(path: Path, content: bytes) -> None:
    path.chmod(0o400)
    before = path.stat().st_mtime_ns
    ap.TeacherStatistics.load(path)
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before
    assert os.listdir(path.parent) == [path.name]
