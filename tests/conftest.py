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
# Some hundred processes start; without byte code each compiles what it imports, which takes seconds.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
REPOSITORY = str(Path(__file__).resolve().parents[1])
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)
# Classes "of a user's own" that tests of several folders name by dotted path.
sys.path.append(str(Path(__file__).resolve().parent / "training"))


# Files whose tests last longest come first, so that no process is left alone with one of them at the end.
LONGEST_FIRST = ("tests/end_to_end", "tests/distributed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files, and a mark for tests that start a Slurm: it starts a dozen ranks at once and counts seconds, so
    that they run by themselves (`make test`).
    """

    def turn(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=turn)
    for item in items:
        if "running_slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    """Persistent worker processes over gloo; see `ProcessPool.run`."""
    processes = ProcessPool(tmp_path_factory.mktemp("pool"))
    yield processes
    processes.close()


@pytest.fixture(scope="module", autouse=True)
def no_layout_left() -> Iterator[None]:
    """A command leaves its layout to the end of its process, which is the tests' own here."""
    yield
    groups = sys.modules.get("model.parallel.groups")
    if groups is not None and groups.is_initialized():
        groups.destroy()


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A layout of one process in the test's own process, for tests that build a model."""
    from model.parallel import groups

    with tempfile.TemporaryDirectory() as folder:
        groups.initialize(rank=0, world_size=1, init_method=f"file://{folder}/store")
        groups.seed_random_streams(1234)
        yield
        groups.destroy()
