"""Damaged and hostile ``l.npz`` of DPM-Solver-v3, and what loading them may do. `file_fuzzer` runs this too."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
from file_fuzzer import damage_bytes, limited_memory

import analytic_precond as ap

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
SHAPES = [
    "5,3,2,2", "True,3,2,2", "-5,3,2,2", "5.0,3,2,2", "10**9,", "10000000000000,3,2,2", "4294967296,4294967296", "0,",
    "", "(5,),3", f"1{'0' * 40},",
]  # fmt: skip
DTYPES = [
    "'<f4'", "'|O'", "5", "'<f2'", "'>f8'", "[('a','<f4')]", "('<f4',(2,2))", "'|V0'", "'<U9999999'", "'<M8[zz]'",
    "'\0'", "None", "'<c8'",
]  # fmt: skip
OTHER_HEADERS = ["{'descr'", "(" * 3000, "[" * 9000, "{1,2}", "{[]:1}", "{b'descr':1}", "", "{}", "'" * 99, "\xff" * 20]


def good_archives() -> list[bytes]:
    """Return a small file in each way that zip files are compressed."""
    contents = []
    for method in METHODS:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", method) as archive, archive.open("l.npy", "w") as member:
            np.save(member, np.linspace(0, 1, 60, dtype=np.float32).reshape(5, 3, 2, 2))
        contents.append(content.getvalue())
    return contents


def damage_array_header(content: bytes, rng: random.Random) -> bytes:
    """Lie about the array."""
    text = f"{{'descr':{rng.choice(DTYPES)},'fortran_order':False,'shape':({rng.choice(SHAPES)})}}"
    header = rng.choice((text, text, text, rng.choice(OTHER_HEADERS))).encode("latin1") + b"\n"
    version, length = rng.choice((1, 1, 2, 3, 4)), rng.choice((len(header), len(header), len(header), 0, 2**16 - 1))
    array = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length) + header
    damaged = io.BytesIO()
    with zipfile.ZipFile(damaged, "w", rng.choice(METHODS)) as archive:
        archive.writestr(rng.choice(("l.npy", "l.npy", "l.npy", "l", "L.npy", "l/")), array + bytes(240))
    return damaged.getvalue()


def damage_flags(content: bytes, rng: random.Random) -> bytes:
    """Say that the array is encrypted, or compressed in another way."""
    raw, entry = bytearray(content), content.find(b"PK\x01\x02")
    if rng.random() < 0.5:
        raw[6] |= 1
        raw[entry + 8] |= 1
    else:
        raw[8] = raw[entry + 10] = rng.choice((0, 8, 9, 12, 14, 93, 99))
    return bytes(raw)


def load_archive(content: bytes, path: Path) -> bool:
    """Load an ``l.npz``, beside a good ``sb.npz``; return whether it is usable. Fail if it does anything else."""
    path.write_bytes(content)
    np.savez(path.with_name("sb.npz"), s=np.zeros((5, 1, 1, 1)), b=np.zeros((5, 3, 2, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of headers as Python 2 wrote them
        try:
            ems, message = ap.load_ems(path.parent), ""
        except ValueError as error:
            ems, message = None, str(error)
    assert len(message) < 2_000, f"too long a message: {message:.200}"
    if ems is None:
        return False
    assert len(ems.levels) == len(ems.l) == 5
    assert ems.l.ndim == 4
    assert bool(ems.l.isfinite().all())
    return True


def fuzz_archives_at_random(runs: int, seed: int, path: Path) -> int:
    """Load so many damaged files, the good ones in turn; return how many were usable."""
    rng, good, usable = random.Random(seed), good_archives(), 0
    damages = (damage_bytes, damage_bytes, damage_bytes, damage_array_header, damage_flags)
    with limited_memory():
        for run in range(runs):
            usable += load_archive(rng.choice(damages)(good[run % len(good)], rng), path)
    return usable
