from __future__ import annotations

import itertools

import pytest

from training.config import OptimizerConfig
from training.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_peak_and_end(schedule: str) -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, schedule=schedule, warmup_steps=10)
    rates = [learning_rate(config, step, 110) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    if schedule != "constant":
        assert rates[59] == pytest.approx(0.55)  # half-way
    assert learning_rate(config, 500, 110) == rates[-1]


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    assert 1.9 < learning_rate(config, 1, 100) < 2.0
