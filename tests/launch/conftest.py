"""The real Slurm that the tests of submission share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[SlurmCluster]:
    """Eight nodes; started when the first test asks for it, and ended with all its daemons."""
    folder = Path(tempfile.mkdtemp(prefix="nextstate_slurm_"))
    with SlurmCluster(folder, 8) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slurm(running_slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with this process's commands talking to it while the tests of a module run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running_slurm.environment.items():
            patch.setenv(name, value)
        yield running_slurm
