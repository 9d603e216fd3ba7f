"""docs/distillation.md: its blocks run, in order, and its links and pictures exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkout import DOCS

PAGE = (DOCS / "distillation.md").read_text()


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) > 6
    namespace: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number, block in enumerate(blocks):
            exec(compile(block, f"distillation.md, block {number}", "exec"), namespace)
    assert "Teacher check of GaussianDenoiser: consistent" in capsys.readouterr().out


def test_links_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (DOCS / link).exists(), link
