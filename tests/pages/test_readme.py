"""The README's promises: its example runs, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT

README = (ROOT / "README.md").read_text()


def test_example_runs_and_says_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    # unseeded data: 2048 pairs of 6 elements bring the coefficients within 3 %, ten times their spread
    assert namespace["c_skip"].item() == pytest.approx(0.2035, rel=0.03)  # type: ignore[attr-defined]
    assert namespace["c_out"].item() == pytest.approx(0.6386, rel=0.03)  # type: ignore[attr-defined]
    assert namespace["x_s"].shape == (16, 6)  # type: ignore[attr-defined]
    assert (tmp_path / "teacher.safetensors").is_file()


def test_commands_and_links_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_docstrings_refer_to_sections_that_exist() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs/method.md").read_text(), flags=re.MULTILINE))
    references = []
    for path in (ROOT / "analytic_precond").rglob("*.py"):
        for match in re.findall(r"docs/method\.md, sections? ([\d, andto]+)", path.read_text()):
            references += re.findall(r"\d+", match)
    assert len(references) > 8
    assert set(references) <= sections


def test_public_names_are_documented_and_exist() -> None:
    import analytic_precond as ap

    assert len(set(ap.__all__)) == len(ap.__all__)
    for name in ap.__all__:
        value = getattr(ap, name)
        assert not callable(value) or (value.__doc__ or "").strip(), name


def test_contributing_names_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:\S+ )*?([\w.]+/[\w./]*|[\w/]+\.py)(?: --list)?`", page))
    assert {"preconditionings/hand_crafted.py", "teachers/", ".ci/walks.py", "tests/support/file_fuzzer.py"} <= named
    roots = (
        ROOT,
        ROOT / "analytic_precond",
        ROOT / "tests" / "preconditionings",
        ROOT / "analytic_precond" / "noise_levels",
    )
    assert not {name for name in named if not any((root / name).exists() for root in roots)}
