r"""Warnings that point at the user's own line, however deep in the package the reason is found."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(f"{Path(module).parent}{os.sep}" for module in (__file__, torch.__file__))  # torch's for its decorators


def warn_caller(message: str) -> None:
    """Warn at the first frame outside this package and torch, rather than at one so many frames up."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})  # what Python tells repeated warnings by
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), registry
    )
