"""The order of one global batch late in a long run, from nothing: what a rank that starts or resumes waits for.

    python -m benchmarks.cold_order [--rounds 5] [--batch 1024] [--step 290000]

A mixture of 8 datasets of a 10T-token run (rows of 32,768 tokens) is made and one batch is located, in a process of its own each
time; imports are not counted. Milliseconds of wall and of CPU (medians), and how far the process's peak memory grew (the largest).
The weights: with a small common denominator; at random, without one; with one dataset of a thousandth, of 3 in 100,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from random import Random

ROWS = 305_000_000  # of 32,768 tokens: 10T tokens


def weights_of(case: str) -> list[float]:
    random = Random(0)
    drawn = [random.random() + 0.05 for _ in range(8)]
    return {
        "common denominator": [0.55, 0.25, 0.05, 0.05, 0.025, 0.025, 0.025, 0.025],
        "at random": drawn,
        "one of .001": [0.001 * sum(drawn[1:]), *drawn[1:]],
        "one of .00003": [0.00003 * sum(drawn[1:]), *drawn[1:]],
    }[case]


CASES = ("common denominator", "at random", "one of .001", "one of .00003")


def measure(case: str, batch: int, step: int) -> dict[str, float]:
    """In this process, which has not used any of it before."""
    import resource
    import time

    import numpy as np

    from data_pipeline.loading.mixture import Mixture

    weights = {f"d{number}": weight for number, weight in enumerate(weights_of(case))}
    samples = np.arange(step * batch, (step + 1) * batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    mixture = Mixture(dict.fromkeys(weights, ROWS // len(weights)), weights, 1234, "pretrain_1")
    mixture.locate_many(samples)
    return {
        "wall_milliseconds": 1e3 * (time.perf_counter() - wall),
        "cpu_milliseconds": 1e3 * (time.process_time() - cpu),
        "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "period": mixture.period,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--step", type=int, default=290_000)
    parser.add_argument("--case", choices=CASES, help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.batch, arguments.step)))
        return
    command = [sys.executable, "-m", "benchmarks.cold_order", "--batch", arguments.batch, "--step", arguments.step]
    print(f"{'weights':<22}{'period':>8}{'wall ms':>10}{'CPU ms':>10}{'MiB':>7}")
    for case in CASES:
        found = [
            json.loads(subprocess.run([*map(str, command), "--case", case], check=True, capture_output=True).stdout)
            for _ in range(arguments.rounds)
        ]
        wall, cpu = (statistics.median(one[f"{kind}_milliseconds"] for one in found) for kind in ("wall", "cpu"))
        memory = max(one["mebibytes"] for one in found)
        print(f"{case:<22}{found[0]['period']:>8,.0f}{wall:>10.1f}{cpu:>10.1f}{memory:>7.1f}")


if __name__ == "__main__":
    main()
