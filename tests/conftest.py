"""Shared fixtures: a pool of worker processes that lives for the whole session, and a layout of one process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_pool import ProcessPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = str(Path(__file__).resolve().parents[1])
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)
# Classes "of a user's own" that tests of several folders name by dotted path.
sys.path.append(str(Path(__file__).resolve().parent / "training"))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    """Persistent worker processes over gloo; see `ProcessPool.run`."""
    processes = ProcessPool(tmp_path_factory.mktemp("pool"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A layout of one process in the test's own process, for tests that build a model."""
    from model.parallel import groups

    with tempfile.TemporaryDirectory() as folder:
        groups.initialize(rank=0, world_size=1, init_method=f"file://{folder}/store")
        groups.seed_random_streams(1234)
        yield
        groups.destroy()
