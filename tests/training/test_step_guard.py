"""The guard's state machine."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from training.config import ReliabilityConfig
from training.contracts.results import StepResult
from training.reliability.guard import NUM_NORMS_BEFORE_JUDGING, StepGuard, Verdict


def guard(**options) -> StepGuard:
    return StepGuard(ReliabilityConfig(**options))


def test_skip_then_roll_back_then_stop():
    machine = guard(max_consecutive_skips=2, max_rollbacks=1)
    verdicts = []
    for _ in range(6):
        verdict = machine.judge(StepResult(math.nan, 1.0)).verdict
        verdicts.append(verdict)
        if verdict is Verdict.ROLL_BACK:
            machine.has_rolled_back(machine.num_rollbacks + 1)
    skip = Verdict.SKIP
    assert verdicts == [skip, skip, Verdict.ROLL_BACK, skip, skip, Verdict.STOP]


def test_a_good_step_forgives_skips_but_not_rollbacks():
    machine = guard(max_consecutive_skips=1, max_rollbacks=1)
    for _ in range(3):
        assert machine.judge(StepResult(1.0, math.inf)).verdict is Verdict.SKIP
        assert machine.judge(StepResult(1.0, 1.0)).verdict is Verdict.APPLY
    machine.judge(StepResult(math.inf, 1.0))
    assert machine.judge(StepResult(math.inf, 1.0)).verdict is Verdict.ROLL_BACK
    machine.has_rolled_back(1)
    machine.judge(StepResult(1.0, 1.0))
    machine.judge(StepResult(math.inf, 1.0))
    assert machine.judge(StepResult(math.inf, 1.0)).verdict is Verdict.STOP


def test_spikes_are_measured_against_the_median_of_applied_steps():
    machine = guard(spike_factor=10.0, max_consecutive_skips=5)
    for _ in range(NUM_NORMS_BEFORE_JUDGING - 1):
        assert machine.judge(StepResult(1.0, 1.0)).verdict is Verdict.APPLY
    assert machine.judge(StepResult(1.0, 2.0)).verdict is Verdict.APPLY
    assert machine.judge(StepResult(1.0, 10.5)).verdict is Verdict.SKIP
    assert machine.judge(StepResult(1.0, 10.5)).verdict is Verdict.SKIP  # the skipped one did not move the median
    assert machine.judge(StepResult(1.0, 9.5)).verdict is Verdict.APPLY
    off = guard(spike_factor=0.0)
    assert all(off.judge(StepResult(1.0, norm)).verdict is Verdict.APPLY for norm in [1.0] * 30 + [1e9])


values = st.sampled_from([1.0, 1.5, 30.0, math.nan, math.inf])


@given(st.lists(st.tuples(values, values), max_size=60), st.integers(0, 60))
def test_a_restored_guard_decides_alike(steps, cut):
    options = {"spike_factor": 8.0, "max_consecutive_skips": 2, "max_rollbacks": 3}
    unbroken, first = guard(**options), guard(**options)

    def play(machine, part):
        verdicts = []
        for loss, norm in part:
            verdicts.append(machine.judge(StepResult(loss, norm)).verdict)
            if verdicts[-1] is Verdict.ROLL_BACK:
                machine.has_rolled_back(machine.num_rollbacks + 1)
        return verdicts

    expected = play(unbroken, steps)
    actual = play(first, steps[:cut])
    second = guard(**options)
    second.load_state(json.loads(json.dumps(first.state())))
    actual += play(second, steps[cut:])
    assert actual == expected
    assert expected.count(Verdict.ROLL_BACK) <= 3
