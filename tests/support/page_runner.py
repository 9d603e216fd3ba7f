"""Runs the blocks of a page of docs/integrate, against stand-ins for what it imports and changes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import alone
from checkout import DOCS
from torch import Tensor, nn

import analytic_precond as ap

PAGES = DOCS / "integrate"
Namespace = dict[str, Any]
th = torch  # its name in OpenAI's and Sony's code


@pytest.fixture(autouse=True)
def quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write files, draw random numbers and run networks too small for threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ap, "estimate_statistics", functools.partial(ap.estimate_statistics, progress=False))
    with alone():
        yield


def blocks(page: str) -> list[tuple[str, str]]:
    """Languages and texts of all blocks of a page, of which there are only python and diff."""
    text = (PAGES / page).read_text()
    found = re.findall(r"^```(python|diff)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert text.count("```") == 2 * len(found)
    return found


def run_page(
    page: str, namespace: Namespace, *stand_ins: type | Callable[..., Any], forgotten: str | None = None
) -> None:
    """Run a page's python blocks in order; apply its diffs to the stand-ins' source and to their instances.

    A reader may forget the diffs that contain a text.
    """
    sources = {stand_in.__name__: inspect.getsource(stand_in) for stand_in in stand_ins}
    namespace |= {"append_dims": append_dims, "torch": torch, "th": torch, "nn": nn, "Any": Any, "Tensor": Tensor}
    namespace |= {"__name__": page, **{stand_in.__name__: stand_in for stand_in in stand_ins}}
    python = diff = 0
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            python += 1
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)
            continue
        if forgotten is not None and forgotten in text:
            continue
        for hunk in re.split(r"^@@ .* @@ .*\n", text, flags=re.MULTILINE)[1:]:
            diff += 1
            patched = [name for name, source in sources.items() if patch(source, hunk) != source]
            assert len(patched) == 1, hunk
            sources[patched[0]] = patch(sources[patched[0]], hunk)
        for name, source in sources.items():
            old = namespace[name]
            exec(compile(source, f"{page}, {name}", "exec"), namespace)
            for value in list(namespace.values()):
                if isinstance(old, type) and type(value) is old:
                    value.__class__ = namespace[name]
    assert python >= 2
    assert forgotten is not None or diff == sum(
        text.count("@@ ") // 2 for language, text in blocks(page) if language == "diff"
    )


def patch(source: str, hunk: str) -> str:
    """Replace a hunk's old lines, found once, by its new ones; unchanged where they are not found."""
    lines, marked = source.splitlines(), hunk.splitlines()
    old = [line[1:].strip() for line in marked if line[0] in " -"]
    starts = [i for i in range(len(lines)) if [line.strip() for line in lines[i : i + len(old)]] == old]
    if not starts:
        return source
    (start,) = starts
    shift = indent(lines[start]) - indent(marked[0][1:])
    new = [" " * (indent(line[1:]) + shift) + line[1:].strip() for line in marked if line[0] in " +"]
    return "\n".join([*lines[:start], *new, *lines[start + len(old) :], ""])


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def append_dims(level: Tensor, ndim: int) -> Tensor:
    return level.reshape(-1, *[1] * (ndim - 1))
