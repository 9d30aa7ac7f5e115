"""The real Slurm that the tests of submission share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Six nodes; started when the first test asks for it, and ended with all its daemons."""
    folder = Path(tempfile.mkdtemp(prefix="nextstate_slurm_"))
    with SlurmCluster(folder, 6) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def on_slurm(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """`slurm`, with this process's commands talking to it."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    return slurm
