"""How many steps of recorded runs the guard against spikes would have skipped, by factor.

    python -m benchmarks.spike_guard runs/demo/*/metrics.jsonl

The guard itself judges, on the gradient norms as they were logged; runs must have logged every step.
"""

from __future__ import annotations

import sys
from pathlib import Path

from training.config import ReliabilityConfig
from training.contracts.results import StepResult
from training.reliability.guard import NUM_NORMS_BEFORE_JUDGING, StepGuard, Verdict
from training.reliability.json_lines import read_json_lines

FACTORS = (2.0, 3.0, 5.0, 10.0, 20.0)


def num_skipped(norms: list[float], factor: float) -> int:
    """A rollback is counted as a skip: the run is a record, nothing can be drawn again."""
    guard = StepGuard(ReliabilityConfig(spike_factor=factor, max_consecutive_skips=len(norms)))
    return sum(guard.judge(StepResult(1.0, norm)).verdict is not Verdict.APPLY for norm in norms)


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        lines = read_json_lines(path)
        norms = [line["gradient_norm"] for line in lines if line.get("gradient_norm") is not None]
        skipped = ", ".join(f"{factor:g}: {num_skipped(norms, factor)}" for factor in FACTORS)
        print(f"{path}: {max(0, len(norms) - NUM_NORMS_BEFORE_JUDGING)} steps judged; skipped by factor {skipped}")


if __name__ == "__main__":
    main(sys.argv[1:])
