"""The free world against brute force: the judge, captions, motion, edits, and what no training document shows."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.free_world import tasks
from examples.free_world.bodies import (
    GROUNDS,
    ROOM,
    SHAPES,
    SIDE,
    Body,
    Scene,
    draw,
    is_held_out,
    pairs,
    random_ground,
    random_scene,
)
from examples.free_world.build import WORLD
from examples.free_world.datasets import VIDEO_FRAMES, FreeCorpusConfig
from examples.free_world.dictionary import Dictionary
from examples.free_world.edits import random_edit, random_edit_in_part
from examples.free_world.judge import read_scene, same_bodies, same_places
from examples.free_world.laws import changed_course, course, is_held_out_law, laws, random_clip, simulate, velocity
from examples.free_world.words import CLEAR_PIXELS, RELATIONS, THING, WHAT_NEXT, describe
from examples.shapes_world.build import write_dataset
from examples.shapes_world.datasets import Sample
from training.inference.baselines import CopyOfTheLast, Pictures, accuracy_of
from training.inference.evaluation import EvaluationPrompt

TASKS = (tasks.FreeT2I, tasks.FreeNextState, tasks.FreeEdit, tasks.FreeReconstruction)


def test_the_judge_reads_what_is_drawn_on_every_ground() -> None:
    rng, grounds = np.random.default_rng(0), set()
    for number in range(25):
        scene, ground = random_scene(rng, 1 + number % 5, held_out=number % 2 == 0), random_ground(rng)
        grounds.add(ground.kind)
        found = read_scene(draw(scene, ground))
        assert found is not None
        assert same_places(found, scene, 1.0)
    assert grounds == set(GROUNDS)


def test_the_judge_sees_every_small_difference() -> None:
    rng = np.random.default_rng(1)
    scene = (Body("triangle", "red", "small", 16.0, 16.0), Body("square", "blue", "large", 40.0, 32.0))
    ground = random_ground(rng)
    others: list[Scene] = [
        scene[:1],
        (*scene, Body("bar", "green", "small", 8.0, 40.0)),
        (Body("triangle", "red", "large", 16.0, 16.0), scene[1]),
        (Body("square", "red", "small", 16.0, 16.0), scene[1]),
        (Body("triangle", "yellow", "small", 16.0, 16.0), scene[1]),
        (scene[0].at(24.0, 16.0), scene[1]),
    ]
    for other in others:
        found = read_scene(draw(other, ground))
        assert found is not None
        assert not same_places(found, scene, 3.0)
    spoilt = draw(scene, ground)
    spoilt[11:16, 11:26] = (220, 40, 220)
    assert read_scene(spoilt) is None
    assert read_scene(spoilt[:32]) is None


def test_captions_state_what_holds_and_nothing_else() -> None:
    rng, openings = np.random.default_rng(2), set()
    for number in range(40):
        scene = random_scene(rng, 1 + number % 5)
        text, relations = describe(scene, rng)
        openings.add(text.split("a ")[0])
        assert all(f"a {body.size} {body.name}" in text for body in scene)
        for relation in relations:
            one, other = (next(body for body in scene if body.pair == pair) for pair in (relation.one, relation.other))
            assert RELATIONS[relation.words](one, other) >= CLEAR_PIXELS
            assert relation.holds(scene)
            mirrored = tuple(body.at(SIDE - body.x, SIDE - body.y) for body in scene)
            assert not relation.holds(mirrored)
    assert len(openings) > 1
    orders = {describe(scene, rng)[0].index(scene[0].name) for _ in range(20)}
    assert len(orders) > 1


def test_motion_keeps_to_the_law_until_something_is_met() -> None:
    """A lone body against a closed form: mirrored at the walls; two that meet exchange their speeds."""
    for law in laws(False):
        body, straight = Body("triangle", "red", "small", 16.0, 24.0), velocity(law)
        scenes = simulate((body,), straight[None], 8)
        for frame, (found,) in enumerate(scenes):
            wanted = [mirrored(place + frame * step) for place, step in zip((16.0, 24.0), straight, strict=True)]
            assert (found.x, found.y) == pytest.approx(wanted, abs=1e-9)
            assert found.is_on_lattice
    left, right = Body("triangle", "red", "small", 8.0, 24.0), Body("triangle", "green", "large", 32.0, 24.0)
    after = simulate((left, right), np.array([[8.0, 0.0], [-8.0, 0.0]]), 3)
    # They meet after half a frame, where their rooms touch, and exchange their speeds; then each is back at a wall.
    assert [(one.x, other.x) for one, other in after] == [(8.0, 32.0), (8.0, 32.0), (16.0, 40.0)]


def test_clips_stay_on_the_lattice_whatever_is_met() -> None:
    """A place between those that the vision tokenizer has seen would be a picture that it has not."""
    rng = np.random.default_rng(11)
    clips = [random_clip(rng, 1 + number % 3, held_out=number % 2 == 0) for number in range(300)]
    assert sum(bool(changed_course(clip)) for clip in clips) > 60
    for body in (body for clip in clips for scene in clip.scenes for body in scene):
        assert body.is_on_lattice


def mirrored(place: float) -> float:
    """Where a point is after it was thrown back by walls at ROOM and SIDE - ROOM."""
    span = SIDE - 2 * ROOM
    folded = (place - ROOM) % (2 * span)
    return ROOM + min(folded, 2 * span - folded)


def test_clips_show_their_law_in_frames_and_some_bodies_turn() -> None:
    """Read from the frames by the judge: any two that are shown give the law, and where nothing is met the next frame."""
    rng, num_right, num_straight = np.random.default_rng(3), 0, 0
    for number in range(24):
        clip = random_clip(rng, 1 + number % 3, held_out=number % 2 == 0)
        assert any(map(is_held_out_law, clip.laws)) == (number % 2 == 0)
        assert not any(is_held_out(*body.pair) for body in clip.scenes[0])
        ground = random_ground(rng)
        law_of = {body.pair: law for body, law in zip(clip.scenes[0], clip.laws, strict=True)}
        shown = [read_scene(draw(scene, ground)) for scene in clip.scenes[:-1]]
        for first, second in itertools.pairwise(shown):
            assert first is not None
            assert second is not None
            before = {body.pair: body for body in first}
            for body in second:
                assert (body.x - before[body.pair].x, body.y - before[body.pair].y) == law_of[body.pair]
            guess = tuple(b.at(2 * b.x - before[b.pair].x, 2 * b.y - before[b.pair].y) for b in second)
        is_right = same_places(guess, clip.scenes[-1], 3.0)
        assert is_right == (not changed_course(clip))
        num_right += is_right
        num_straight += not changed_course(clip)
    assert 4 < num_right == num_straight < 20


def test_edits_change_one_thing_and_need_no_place() -> None:
    rng, kinds = np.random.default_rng(4), set()
    for number in range(40):
        edit = random_edit(rng, 1 + number % 5, held_out=number % 2 == 0)
        kinds.add(edit.instruction.split()[0])
        kept = set(edit.source) & set(edit.target)
        assert len(edit.source) - len(kept) == 1
        assert len(edit.target) - len(kept) == (0 if edit.instruction.startswith("remove") else 1)
        assert any(is_held_out(*body.pair) for body in edit.target) == (number % 2 == 0)
        assert sum(body.name in edit.instruction for body in edit.source) == 1
        found = read_scene(draw(edit.target, random_ground(rng)))
        assert found is not None
        assert same_bodies(found, edit.target)
    assert kinds == {"make", "remove"}


def test_edits_in_part_tell_one_body_by_its_colour_and_make_every_pair() -> None:
    rng, made = np.random.default_rng(6), set()
    for number in range(120):
        edit = random_edit_in_part(rng, 1 + number % 5)
        (changed,) = set(edit.source) - set(edit.target)
        assert f" the {changed.color} {THING}" in edit.instruction
        assert [body.color for body in edit.source].count(changed.color) == 1
        assert not any(shape in edit.instruction for shape in SHAPES)
        made |= {body.pair for body in set(edit.target) - set(edit.source)}
    assert set(pairs(True)) < made


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_the_truth_passes_and_copies_and_other_answers_fail(task: type[tasks.FreeTask]) -> None:
    asked = task(num_prompts=15)
    prompts, ground = asked.prompts(), random_ground(np.random.default_rng(5))
    targets = [one.target[0] if task is tasks.FreeT2I else one.target for one in prompts]
    answers = [draw(target, ground) for target in targets]
    assert all(asked.judge(prompt, [answer], "") for prompt, answer in zip(prompts, answers, strict=True))
    assert not any(asked.judge(prompt, [], "") for prompt in prompts)
    assert sum(asked.judge(one, [answer], "") for one, answer in zip(prompts, answers[1:], strict=False)) <= 1
    if task is not tasks.FreeReconstruction:
        assert accuracy_of(CopyOfTheLast(), asked, prompts, list)["accuracy"] == 0.0
    assert {len(target) for target in targets} >= {1, 2}
    again = task(num_prompts=15).prompts()
    assert [one.text for one in again] == [one.text for one in prompts]


def test_a_question_of_what_comes_next_is_the_beginning_of_a_film() -> None:
    film = next(dataset for dataset in WORLD.datasets if dataset.name == "free_video")
    page = json.loads(next(film.samples(FreeCorpusConfig(num_videos=1)))["json"])
    parts = [text or image for text, image in zip(page["texts"], page["images"], strict=True)]
    (prompt,) = tasks.FreeNextState(num_prompts=1).prompts()
    assert [part if isinstance(part, str) else None for part in prompt.parts] == [
        None,
        None,
        WHAT_NEXT,
        None,
        WHAT_NEXT,
    ]
    assert parts[:5] == ["picture_0.png", "picture_1.png", WHAT_NEXT, "picture_2.png", WHAT_NEXT]
    told = tasks.FreeNextState(num_prompts=1, words=True).prompts()[0]
    assert (len(told.images), told.format) == (1, "x2i")


def test_training_documents_name_nothing_that_is_held_out_and_some_show_it() -> None:
    """A held-out pair is seen where its name is said in part or not at all; an edit that makes one names no shape."""
    config = FreeCorpusConfig(
        num_images=10, num_part_named=20, num_videos=12, num_told_clips=4, num_edits=10, num_part_named_edits=20
    )
    names = [f"{color} {shape}" for shape, color in pairs(True)]
    assert len(laws(True)) == 2
    num_samples, showing = 0, set()
    for dataset in WORLD.datasets:
        if dataset.kind == "text" or dataset.name == "free_pictures":  # the vision tokenizer alone reads those
            continue
        for sample in dataset.samples(config):
            num_samples += 1
            text = words_of(sample)
            assert not any(name in text for name in names)
            told = [part.split(" moves ")[1] for part in text.split(" and ") if " moves " in part]
            assert not {course(law) for law in laws(True)} & set(told)
            pictures = [
                read_scene(np.asarray(Image.open(io.BytesIO(sample[key]))))
                for key in sorted(sample)
                if key.endswith("png")
            ]
            assert None not in pictures
            if any(is_held_out(*body.pair) for scene in pictures for body in scene or ()):
                showing.add(dataset.name)
                assert set(text.split()) == set(WHAT_NEXT.split()) or dataset.name.startswith("free_part_named")
                assert "make the" not in text or not any(shape in text for shape in SHAPES)
            if dataset.name == "free_video":
                assert VIDEO_FRAMES[0] <= len(pictures) <= VIDEO_FRAMES[1]
                assert not begins_by_a_held_out_law(pictures)
    assert num_samples == 76
    assert showing == {"free_video", "free_part_named", "free_part_named_edit"}


def words_of(sample: Sample) -> str:
    if "json" in sample:
        return " ".join(text for text in json.loads(sample["json"])["texts"] if text)
    return (sample.get("txt") or sample["instruction.txt"]).decode()


def begins_by_a_held_out_law(scenes: Sequence[Scene | None]) -> bool:
    """Of the frames of a clip as the judge reads them: does any body move so from the first to the second?"""
    first, second = scenes[0] or (), {body.pair: body for body in scenes[1] or ()}
    return any(is_held_out_law((round(second[b.pair].x - b.x), round(second[b.pair].y - b.y))) for b in first)


def test_the_dictionary_answers_what_is_seen_and_nothing_that_is_held_out(tmp_path: Path) -> None:
    captioned = next(dataset for dataset in WORLD.datasets if dataset.name == "free_image_text")
    write_dataset(captioned, tmp_path, FreeCorpusConfig(num_images=1000))
    dictionary = Dictionary(str(tmp_path))
    for task in (tasks.FreeT2I, tasks.FreeEdit):
        for held_out, expected in ((False, 1.0), (True, 0.0)):
            asked = task(num_prompts=20, held_out=held_out)
            found = accuracy_of(dictionary, asked, asked.prompts(), nobody)
            assert found["accuracy"] == expected, (asked.name, held_out)


def nobody(prompts: Sequence[EvaluationPrompt]) -> list[Pictures]:
    raise AssertionError("a dictionary asks no model")
