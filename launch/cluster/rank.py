"""One task of a job: `python -m launch.cluster.rank --config resolved.yaml`. Under srun it is one rank, else it starts all."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.storage.file_errors import of_file_error
from model.errors import UserError, escapes_shown

EXIT_STOPPED = 3  # as in training.stage, which is imported late
STOPPED_VARIABLE = "NEXTSTATE_STOPPED_FILE"  # set by the batch script


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's names for what srun tells each task; empty outside of srun."""
    if "SLURM_PROCID" not in environment:
        return {}
    num_ranks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_ranks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
    } | ({"LOCAL_WORLD_SIZE": num_ranks} if environment.get("SLURM_STEP_NUM_NODES") == "1" else {})


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a defect, 2 the user's mistake, 3 stopped after a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    options = parser.parse_args(arguments)
    os.environ.update(rank_variables(os.environ))
    with escapes_shown():
        return run(options.config)


def run(path: Path) -> int:
    try:
        from training.config import load_yaml

        config = load_yaml(path)
        if "RANK" in os.environ:
            from launch.local.left_environment import refuse_left_environment
            from training.stage import run_stage

            refuse_left_environment(config, os.environ)
            run_stage(config)
        else:
            from launch.local.ranks import run_local

            run_local(config)
    except SystemExit as stopped:
        if stopped.code != EXIT_STOPPED:
            raise
        # The batch script may not see this code: the first rank to end makes srun end the others.
        if STOPPED_VARIABLE in os.environ:
            Path(os.environ[STOPPED_VARIABLE]).touch()
        return EXIT_STOPPED
    except Exception as error:  # the boundary of the process
        told = error if isinstance(error, UserError) else of_file_error(error)
        if told is not None:
            print(f"error: {told}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # without waiting for libraries' threads, which may hang after an error
