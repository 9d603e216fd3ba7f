"""Settings of all tests."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from constructions import make_students_from_denoisers
from hypothesis import settings

# the same examples on every machine, and no time limit on each: machines are shared
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


# a background shell starts its processes deaf to interruptions, which tests send to themselves and to others
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what was collected out of garbage collections: memory that runs out, in tests, calls for hundreds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["network", pytest.param("denoiser", marks=pytest.mark.long)])
def around(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test of students around raw networks as it is, and with students around denoisers."""
    if request.param == "denoiser":
        make_students_from_denoisers(monkeypatch)
    return str(request.param)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A torch.distributed group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
