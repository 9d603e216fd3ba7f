"""A watch on the global random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Fail if a global random number generator moves."""

    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy global state is what is watched
        return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(v).tolist() for v in numpy_state]

    before = states()
    yield
    assert states() == before
