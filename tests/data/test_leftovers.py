"""What killed writers leave beside a file: removed, unless they may still be writing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analytic_precond import _files


def leave(folder: Path, pid: int, age: float = 0.0) -> Path:
    path = folder / f".kept.{pid}.tmp"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_files_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead, of_living = leave(tmp_path, dead.pid), leave(tmp_path, os.getppid(), age=1e6)
    _files.remove_leftovers(tmp_path / "kept")
    assert not of_dead.exists()
    assert of_living.exists()


def test_on_windows_no_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There os.kill ends the process, or sends it Ctrl-C."""

    def kill(pid: int, number: int) -> None:
        raise AssertionError("a process was asked")

    monkeypatch.setattr(_files, "_POSIX", False)
    monkeypatch.setattr(os, "kill", kill)
    fresh, old = leave(tmp_path, 1, age=3600), leave(tmp_path, 2, age=25 * 3600)
    _files.remove_leftovers(tmp_path / "kept")
    assert fresh.exists()
    assert not old.exists()
