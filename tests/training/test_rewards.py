"""What a reward may say, and the rules that read the shapes world."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes_world.scenes import ShapesReader, scenes_wanted
from examples.shapes_world.world import Item, all_items, draw_array, make_scene, recolor
from model.errors import UserError
from training.rewards.base import Answer, Scores, scores_of
from training.rewards.registry import make_reward

READER = "examples.shapes_world.scenes.ShapesReader"
SIZE = 48
CROSS, CIRCLE = Item("cross", "red", 0, 0), Item("circle", "blue", 2, 1)


def answer_to(*wanted: Sequence[Item], shown: Sequence[Sequence[Item] | None]) -> Answer:
    images = [None if scene is None else draw_array(make_scene(scene), SIZE) for scene in shown]
    return Answer("t2i", images=images, fields=scenes_wanted([make_scene(scene) for scene in wanted]))


def score(name: str, answer: Answer) -> float | None:
    return scores_of(make_reward(name, {"reader": READER}, "rewards.x"), [answer]).values[0]


@pytest.mark.parametrize("name", ["scene", "count", "color", "shape", "place"])
def test_every_rule_is_full_for_the_wanted_scene_and_nothing_for_no_picture(name):
    assert score(name, answer_to([CROSS, CIRCLE], shown=[[CROSS, CIRCLE]])) == 1.0
    assert score(name, answer_to([CROSS, CIRCLE], shown=[])) == 0.0
    assert score(name, answer_to([CROSS, CIRCLE], shown=[None])) == 0.0  # the grid was not complete
    assert score(name, answer_to([], shown=[[]])) == 1.0
    assert score(name, Answer("t2i", images=[draw_array((), SIZE)])) is None  # the prompt wants no scene


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([recolor(CROSS, "green"), CIRCLE], {"count": 1, "color": 0.5, "shape": 1, "place": 1, "scene": 0.5}),
        ([Item("cross", "red", 1, 1), CIRCLE], {"count": 1, "color": 1, "shape": 1, "place": 0.5, "scene": 0.5}),
        ([Item("square", "red", 0, 0), CIRCLE], {"count": 1, "color": 1, "shape": 0.5, "place": 1, "scene": 0.5}),
        ([CIRCLE], dict.fromkeys(("count", "color", "shape", "place", "scene"), 2 / 3)),
        # All cells full of what was asked for: what is too much costs as what is missing does.
        (
            [Item("cross", "red", row, column) for row in range(3) for column in range(3)],
            {"count": 4 / 11, "scene": 2 / 11},
        ),
    ],
)
def test_rules_tell_mistakes_apart(shown, expected):
    answer = answer_to([CROSS, CIRCLE], shown=[shown])
    assert {name: score(name, answer) for name in expected} == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scene_match_agrees_with_sets(data):
    """Brute force: cells are sets of things, Dice's coefficient by Python's sets."""
    wanted, shown = (
        data.draw(st.lists(st.sampled_from(all_items()), max_size=4, unique_by=lambda item: (item.row, item.column)))
        for _ in range(2)
    )
    total = len(wanted) + len(shown)
    expected = 2 * len(set(wanted) & set(shown)) / total if total else 1.0
    assert score("scene", answer_to(wanted, shown=[shown])) == pytest.approx(expected)


def test_several_pictures_are_judged_each_and_more_than_asked_for_cost():
    two = ([CROSS], [CIRCLE])
    assert score("scene", answer_to(*two, shown=[[CROSS], [CIRCLE]])) == 1.0
    assert score("scene", answer_to(*two, shown=[[CROSS]])) == 0.5
    assert score("scene", answer_to(*two, shown=[[CIRCLE], [CROSS]])) == 0.0
    assert score("scene", answer_to(*two, shown=[[CROSS], [CIRCLE], [CROSS]])) == pytest.approx(2 / 3)


def test_what_cannot_be_read_counts_as_a_thing_too_many():
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    reading = ShapesReader().read(noise)
    assert (reading.things, reading.num_unreadable) == ([], 9)
    assert ShapesReader().read(np.zeros((47, 48, 3), np.uint8)).num_unreadable == 1
    answer = answer_to([CROSS], shown=[[CROSS]])
    answer.images[0][-16:, -16:] = noise[-16:, -16:]
    assert score("scene", answer) == pytest.approx(2 / 3)


class Says:
    """A reward that says what it was made with."""

    version = "1"

    def __init__(self, values: object = (), name: object = "says"):
        self.values = values
        self.name = name

    def score(self, answers):
        if isinstance(self.values, Exception):
            raise self.values
        return self.values


@pytest.mark.parametrize(
    ("given_scores", "values", "faults"),
    [
        ([1, 0.0, np.float32(0.5)], [1.0, 0.0, 0.5], {}),
        ([math.nan, None, True], [None, None, 1.0], {"not finite": 1, "not judged": 1}),
        ([10**400, "7", -3], [None, None, -3.0], {"not finite": 1, "not a number": 1}),
        ([1.0, 2.0], [None] * 3, {"2 scores for 3 answers": 3}),
        (RuntimeError("out of memory"), [None] * 3, {"raised RuntimeError": 3}),
    ],
)
def test_what_cannot_be_believed_is_missing_and_never_zero(given_scores, values, faults):
    assert scores_of(Says(given_scores), [Answer("t2i")] * 3) == Scores(values, faults)


def test_a_wrong_configuration_is_no_fault_of_a_batch():
    with pytest.raises(UserError, match="no server"):
        scores_of(Says(UserError("no server")), [Answer("t2i")])


def test_rewards_of_ones_own_by_dotted_path():
    reward = make_reward("test_rewards.Says", {"values": [2.0]}, "rewards.mine")
    assert scores_of(reward, [Answer("t2i")]).values == [2.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sceen", {}, "there is no reward named 'sceen'"),
        ("scene", {}, "does not take these arguments"),
        ("scene", {"reader": "examples.shapes_world.scenes.Nobody"}, "the scene reader cannot be imported"),
        ("test_rewards.Says", {"name": None}, "not a reward"),
        ("model.errors.Problems", {}, "not a reward"),
    ],
)
def test_unknown_rewards_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make_reward(name, options, "rewards.x")
