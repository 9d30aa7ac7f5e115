"""How far the step times are to be trusted: errors on publishers that the efficiencies were not fitted on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from launch.plan.published import FAR_OFF, HeldOutError
from launch.plan.published_runs import PublishedRun, published_runs
from launch.plan.timing import Efficiencies

# What is fitted, where a fit begins and what it is drawn to where the rows say nothing: round figures, taken from no row.
PRIOR = {"matrix": 0.85, "attention": 0.8, "memory_passes": 2.0, "fp8_passes": 3.0}
SHARES = ("matrix", "attention")  # at most 1
PRIOR_WEIGHT = 0.1  # of a doubling of an efficiency against a doubling of one row's error
NUM_ITERATIONS, STEP, SETTLED = 12, 1e-3, 1e-3


def fit(runs: Sequence[PublishedRun]) -> Efficiencies:
    """The efficiencies that describe these rows best: least squares of the logarithms, damped towards `PRIOR`.

    n rows of one publisher weigh as much as the root of n rows of different ones: they share a program and a cluster.
    """
    prior = np.log(list(PRIOR.values()))
    rows_of = Counter(run.publisher for run in runs)
    weights = np.array([rows_of[run.publisher] ** -0.25 for run in runs])  # of residuals; their squares are added

    def rates(logs: np.ndarray) -> Efficiencies:
        values = dict(zip(PRIOR, np.exp(logs).tolist(), strict=True))
        return replace(Efficiencies(), **{name: min(1.0, v) if name in SHARES else v for name, v in values.items()})

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = rates(logs)
        errors = np.log([run.predicted(found) / run.tokens_per_second for run in runs])
        return np.concatenate((weights * errors, PRIOR_WEIGHT * (logs - prior)))

    logs, base = prior.copy(), residuals(prior)
    for _ in range(NUM_ITERATIONS):
        steps = np.eye(len(logs)) * STEP
        jacobian = np.stack([(residuals(logs + step) - base) / STEP for step in steps], axis=1)
        change = np.linalg.lstsq(jacobian, -base, rcond=None)[0]
        scale, tried = 1.0, residuals(logs + change)
        while scale > STEP and np.sum(tried**2) > np.sum(base**2):
            scale /= 2
            tried = residuals(logs + scale * change)
        logs, base = logs + scale * change, tried
        if np.abs(scale * change).max() < SETTLED:
            break
    return rates(logs)


def forecasts() -> list[tuple[PublishedRun, float]]:
    """Every published run, with the tokens per second that the other publishers' rows make one expect of it."""
    runs = published_runs()
    rates = {name: fit([run for run in runs if run.publisher != name]) for name in {run.publisher for run in runs}}
    return [(run, run.predicted(rates[run.publisher])) for run in runs]


def summary(found: Sequence[tuple[PublishedRun, float]], kind: str) -> dict[str, HeldOutError]:
    """Errors by `device`, by `publisher`, or of all rows."""
    errors: dict[str, list[float]] = defaultdict(list)
    for run, forecast in found:
        errors["all" if kind == "all" else getattr(run, kind)].append(abs(forecast / run.tokens_per_second - 1))
    return {
        name: HeldOutError(len(one), round(sum(one) / len(one), 3), round(max(one), 3), sum(e > FAR_OFF for e in one))
        for name, one in sorted(errors.items())
    }


def compare() -> dict[str, Any]:
    """Forecast against published throughput of every configuration; errors are signed shares of the published."""
    found = forecasts()
    rows = [
        {
            "publisher": run.publisher,
            "name": run.name,
            "source": run.source,
            "accelerators": run.layout.world_size,
            "device": run.device,
            "published": round(run.tokens_per_second, 1),
            "forecast": round(forecast, 1),
            "error": round(forecast / run.tokens_per_second - 1, 4),
        }
        for run, forecast in found
    ]
    return {
        "runs": rows,
        "held_out": {
            kind: {name: asdict(error) for name, error in summary(found, kind).items()}
            for kind in ("all", "device", "publisher")
        },
    }
