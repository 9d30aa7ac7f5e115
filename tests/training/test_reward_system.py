"""Several signals on one scale: weights, missing scores, the gate, frozen scales, guards, and what is kept for eyes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import Problems, UserError
from training.rewards.alarm import HackingAlarm
from training.rewards.base import Answer
from training.rewards.scale import Scale, Scales, fitted
from training.rewards.showcase import Showcase
from training.rewards.system import RewardEntry, RewardsConfig, RewardSystem

PICTURE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


class FromField:
    """What the answer's fields say of it."""

    name = "from_field"

    def __init__(self, field: str, version: str = "1"):
        self.field, self.version = field, version

    def score(self, answers):
        return [answer.fields.get(self.field) for answer in answers]


def entry(field: str, **values) -> RewardEntry:
    options = {"field": field} | values.pop("options", {})
    return RewardEntry("test_reward_system.FromField", options, **values)


def answer(task: str = "t2i", **fields) -> Answer:
    return Answer(task, images=[PICTURE], fields=fields)


def system(max_missing_share: float = 0.9, **signals: RewardEntry) -> RewardSystem:
    return RewardSystem(RewardsConfig(signals, max_missing_share=max_missing_share))


def test_weighted_mean_of_general_and_task_signals():
    made = system(
        general=entry("a", range=[0, 1], weight=1.0),
        text=entry("b", range=[0, 10], weight=3.0, tasks=["x2i"]),
        guard=entry("c", range=[0, 1], guard=True, weight=100.0),
    )
    judged = made.judge([answer(a=0.5, b=10, c=0), answer("x2i", a=0.5, b=10, c=1), answer("x2i", a=0, b=-7, c=1)])
    assert judged.totals == pytest.approx([5.5, (5.5 + 3 * 10) / 4, 1.0])
    assert np.isnan(judged.signals["text"][0])
    assert judged.raw["text"][1:] == pytest.approx([10, -7])
    assert judged.weights["guard"].tolist() == [0, 0, 0]
    metrics = judged.metrics(["t2i", "x2i", "x2i"])
    assert metrics["reward/x2i"] == pytest.approx((35.5 / 4 + 1) / 2)
    assert metrics["signal/t2i/guard"] == 1.0
    assert "signal/t2i/text" not in metrics


def test_a_missing_score_makes_the_total_missing_never_zero():
    made = system(a=entry("a", range=[0, 1]), b=entry("b", range=[0, 1]), guard=entry("c", range=[0, 1], guard=True))
    judged = made.judge([answer(a=1, b=1), answer(a=1, b=math.nan), answer(a=1, b=1, c=1)])
    assert judged.totals[[0, 2]].tolist() == [10, 10]
    assert np.isnan(judged.totals[1])
    assert judged.faults == {"a": {}, "b": {"not finite": 1}, "guard": {"not judged": 2}}
    assert judged.metrics(["t2i"] * 3)["scores_missing"] == {"a": 0, "b": 1, "guard": 2}


def test_too_many_missing_scores_stop_the_run():
    with pytest.raises(UserError, match=r"too many scores are missing[^$]*a: not judged \(1\)"):
        system(0.3, a=entry("a", range=[0, 1])).judge([answer(a=1), answer()])


@pytest.mark.parametrize(
    "bad",
    [
        Answer("t2i"),  # an empty answer
        Answer("t2i", text="words, and no picture"),
        Answer("t2i", images=[None], fields={"a": 1}),  # the grid was not complete
        Answer("t2i", images=[PICTURE, None], fields={"a": 1}),
        Answer("t2i", images=[np.full_like(PICTURE, 7)], fields={"a": 1}),  # blank
        Answer("t2i", images=[PICTURE], fields={"a": 1, "num_images": 2}),
        Answer("t2i", text=" \n", fields={"a": 1, "num_images": 0}),
    ],
)
def test_the_gate_gives_bad_answers_the_lowest_reward(bad):
    judged = system(a=entry("a", range=[0, 1])).judge([bad, answer(a=0.5)])
    assert judged.totals.tolist() == [1.0, 5.5]
    assert judged.acceptable.tolist() == [False, True]
    assert judged.faults == {"a": {}}


def test_text_alone_is_an_answer_where_it_was_asked_for():
    text = Answer("t2i", text="yes", fields={"a": 1, "num_images": 0})
    assert system(a=entry("a", range=[0, 1])).judge([text]).totals.tolist() == [10.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2), st.floats(allow_nan=False))
def test_a_scale_stays_in_its_range_and_keeps_order(values, raw):
    if np.quantile(values, 0.01) < np.quantile(values, 0.99):
        scale = fitted(values, "1", "")
        assert 1.0 <= scale.applied(raw) <= 10.0
        assert scale.applied(scale.low) == 1.0
        assert scale.applied(scale.high) == 10.0
        assert scale.applied(raw) <= scale.applied(raw + 1.0)
    else:
        with pytest.raises(UserError, match="do not spread"):
            fitted(values, "1", "")


def test_scales_are_frozen_in_a_file_with_a_version(tmp_path):
    made = system(a=entry("a", range=None))
    answers = [answer(task, a=float(index)) for index in range(101) for task in ("t2i", "x2i")]
    scales = made.calibrated(answers)
    assert scales.by_task["x2i"]["a"] == Scale(1.0, 99.0, "1", 101)
    path = tmp_path / "scales.json"
    scales.save(path)
    assert Scales.load(path) == scales
    frozen = RewardSystem(RewardsConfig({"a": entry("a")}, scales=str(path)))
    assert frozen.judge([answer(a=50.0)]).totals == pytest.approx([5.5])
    frozen.check_task("t2i")
    with pytest.raises(UserError, match="no scale for a task"):
        frozen.check_task("story")
    changed = json.loads(path.read_text())
    changed["by_task"]["t2i"]["a"]["low"] = 0.0
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="does not fit its own version"):
        Scales.load(path)


def test_a_scale_of_another_version_of_the_reward_is_refused(tmp_path):
    path = tmp_path / "scales.json"
    system(a=entry("a")).calibrated([answer(a=0.0), answer(a=1.0)]).save(path)
    later = RewardSystem(RewardsConfig({"a": entry("a", options={"version": "2"})}, scales=str(path)))
    with pytest.raises(UserError, match="another version of its reward"):
        later.check_task("t2i")


def test_a_run_goes_on_with_the_same_rewards_only():
    before = system(a=entry("a", range=[0, 1])).describe()
    system(a=entry("a", range=[0, 1])).check_unchanged(json.loads(json.dumps(before)))
    for other in (
        entry("a", range=[0, 2]),
        entry("a", range=[0, 1], options={"version": "2"}),
        entry("a", range=[0, 1], weight=2),
    ):
        with pytest.raises(UserError, match="not those that this stage began with"):
            system(a=other).check_unchanged(before)


def test_prompts_need_a_task_that_somebody_judges():
    made = system(a=entry("a", range=[0, 1], tasks=["t2i"]), guard=entry("a", range=[0, 1], guard=True))
    made.check_task("t2i")
    for task, message in (("", "a prompt has no task"), ("story", "no reward judges the task 'story'")):
        with pytest.raises(UserError, match=message):
            made.check_task(task)


def test_all_mistakes_of_a_configuration_are_told_at_once():
    problems = Problems()
    signals = {"a": RewardEntry("sceen", weight=-1), "b": entry("b", range=[1, 0], guard=True)}
    RewardsConfig(signals, max_missing_share=1.0).validate(problems, "rewards")
    told = "\n".join(problems.found)
    for part in ("nothing to learn from", "no reward 'sceen'", "a.weight", "a.range: needs", "b.range", "max_missing"):
        assert part in told


def test_the_alarm_sounds_when_the_reward_rises_and_a_guard_falls():
    rng = np.random.default_rng(0)

    def told(reward_slope: float, guard_slope: float) -> list[str]:
        alarm = HackingAlarm(window_steps=10)
        found = []
        for step in range(40):
            noise = rng.normal(0, 0.1, 2)
            found += alarm.seen(5 + reward_slope * step + noise[0], {"g": 5 + guard_slope * step + noise[1], "h": None})
            alarm = HackingAlarm(10, history=json.loads(json.dumps(alarm.state())))  # as a checkpoint keeps it
        return found

    assert "the guard g changed by -" in told(0.1, -0.1)[0]
    assert not told(0.1, 0.1)
    assert not told(-0.1, -0.1)
    assert not told(0.0, -0.1)


def test_best_and_worst_pictures_are_kept(tmp_path):
    made = system(a=entry("a", range=[0, 1]))
    answers = [answer(task, a=value / 10) for task in ("t2i", "x2i") for value in (3, 9, 1, 5, 7)]
    answers[0].fields["a"] = None  # missing: neither best nor worst
    judged = made.judge(answers)
    showcase = Showcase(tmp_path, every_steps=5, num_answers=1)
    assert showcase.keep(4, answers, judged) == []
    written = showcase.keep(5, answers, judged)
    assert [path.name for path in written] == ["best_1_0.png", "worst_2_0.png", "best_6_0.png", "worst_7_0.png"]
    records = json.loads((tmp_path / "step_000005" / "answers.json").read_text())
    assert [(one["end"], one["task"], round(one["reward"], 6)) for one in records] == [
        ("best", "t2i", 9.1),
        ("worst", "t2i", 1.9),
        ("best", "x2i", 9.1),
        ("worst", "x2i", 1.9),
    ]
