"""How far the step times are to be trusted: errors on publishers that the efficiencies were not fitted on, by device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from launch.plan.published import HeldOutError, PublishedRun, published_runs
from launch.plan.timing import Efficiencies

# Where a fit begins and what it is drawn to where the rows say nothing: round figures, taken from no row.
PRIOR = Efficiencies(
    matrix=0.6, matrix_fp8=0.6, attention=0.3, memory_passes=2.0, fast_links=0.7, network=0.8, tensor_exposed=0.5
)
PRIOR_WEIGHT = 0.1  # of a doubling of an efficiency against a doubling of one row's error
NUM_ITERATIONS, STEP = 12, 1e-3


def fit(runs: Sequence[PublishedRun]) -> Efficiencies:
    """The efficiencies that describe these rows best: least squares of the logarithms, damped towards `PRIOR`."""
    names = [field.name for field in fields(Efficiencies)]
    prior = np.log([getattr(PRIOR, name) for name in names])

    def rates(logs: np.ndarray) -> Efficiencies:
        values = np.exp(logs)
        return Efficiencies(
            **{
                name: float(max(1.0, value) if name == "memory_passes" else min(1.0, value))
                for name, value in zip(names, values, strict=True)
            }
        )

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = rates(logs)
        errors = [np.log(run.predicted(found) / run.tokens_per_second) for run in runs]
        return np.concatenate((errors, PRIOR_WEIGHT * (logs - prior)))

    logs = prior.copy()
    for _ in range(NUM_ITERATIONS):
        base = residuals(logs)
        steps = np.eye(len(logs)) * STEP
        jacobian = np.stack([(residuals(logs + step) - base) / STEP for step in steps], axis=1)
        change = np.linalg.lstsq(jacobian, -base, rcond=None)[0]
        scale = 1.0
        while scale > 1e-3 and np.sum(residuals(logs + scale * change) ** 2) > np.sum(base**2):
            scale /= 2
        logs = logs + scale * change
    return rates(logs)


def held_out_errors() -> dict[str, HeldOutError]:
    """By device: every publisher's rows, predicted with efficiencies fitted on the other publishers' rows."""
    runs = published_runs()
    errors: dict[str, list[float]] = defaultdict(list)
    for publisher in sorted({run.publisher for run in runs}):
        rates = fit([run for run in runs if run.publisher != publisher])
        for run in runs:
            if run.publisher == publisher:
                errors[run.device].append(abs(run.predicted(rates) / run.tokens_per_second - 1))
    return {
        device: HeldOutError(len(found), round(sum(found) / len(found), 3), round(max(found), 3))
        for device, found in sorted(errors.items())
    }
