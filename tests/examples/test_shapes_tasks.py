"""Evaluation tasks: what they ask is held out, what they show is seen as the pipeline would show it."""

from __future__ import annotations

import numpy as np
import pytest

from examples.shapes_world.build import write_dataset
from examples.shapes_world.datasets import DATASETS, CorpusConfig
from examples.shapes_world.dictionary import Dictionary
from examples.shapes_world.judge import read_scene
from examples.shapes_world.media import mp4_bytes, mp4_frames
from examples.shapes_world.motion import FRAMES_PER_SECOND, clip_frames, random_clip
from examples.shapes_world.tasks import EditAccuracy, NextStateAccuracy, ReconstructionAccuracy, ShapesTask, T2IAccuracy
from examples.shapes_world.world import all_items, caption, draw_array, is_held_out
from training.inference.baselines import OtherWords, accuracy_of
from training.inference.evaluation import EvaluationPrompt

TASKS = (T2IAccuracy, EditAccuracy, NextStateAccuracy, ReconstructionAccuracy)


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: task.name)
def task_and_prompts(request: pytest.FixtureRequest):
    task: ShapesTask = request.param()
    return task, task.prompts()


def test_200_distinct_prompts_with_held_out_answers(task_and_prompts):
    _, prompts = task_and_prompts
    assert len(prompts) == 200
    keys = {(p.text, p.target, *(image.tobytes() for image in p.images)) for p in prompts}
    assert len(keys) == 200
    assert {len(prompt.target) for prompt in prompts} == {1, 2}
    assert all(any(map(is_held_out, prompt.target)) for prompt in prompts)
    assert all(prompt.image_size == (48, 48) for prompt in prompts)
    assert all(image.shape == (48, 48, 3) for prompt in prompts for image in prompt.images)


def test_the_true_answer_passes_and_others_fail(task_and_prompts):
    task, prompts = task_and_prompts
    answers = [draw_array(prompt.target, 48) for prompt in prompts]
    assert all(task.judge(prompt, [answer], "") for prompt, answer in zip(prompts, answers, strict=True))
    assert not any(task.judge(prompt, [], "") for prompt in prompts)
    following = zip(prompts, answers[1:], strict=False)
    assert sum(task.judge(prompt, [answer], "") for prompt, answer in following) <= 4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_depend_on_the_seed_only(task: type[ShapesTask]):
    one, same, other = (task(num_prompts=10, seed=seed).prompts() for seed in (7, 7, 8))
    assert [p.target for p in one] == [p.target for p in same]
    assert all(
        np.array_equal(a, b) for p, q in zip(one, same, strict=True) for a, b in zip(p.images, q.images, strict=True)
    )
    assert [p.target for p in one] != [p.target for p in other]
    seen = task(num_prompts=10, held_out=False).prompts()
    assert not any(is_held_out(item) for prompt in seen for item in prompt.target)


@pytest.mark.parametrize("task", TASKS[:3], ids=lambda task: task.name)
def test_what_is_wanted_and_the_judges_reason(task: type[ShapesTask]):
    asked = task(num_prompts=24)
    prompts = asked.prompts()
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        (wanted,), (elsewhere,) = asked.wanted(prompt), asked.wanted(other)
        assert asked.judge(prompt, [wanted], "")
        assert asked.reason(prompt, [wanted], "") == "as wanted"
        told = asked.reason(prompt, [elsewhere], "")
        assert told.count("is missing") == len(set(prompt.target) - set(other.target))
        assert told.count("not asked for") == len(set(other.target) - set(prompt.target))
        noisy = wanted.copy()
        noisy[:16, :16] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
        assert "1 unreadable cell" in asked.reason(prompt, [noisy], "")
    assert asked.reason(prompts[0], [], "") == "no picture"


def test_copying_the_source_or_the_last_frame_fails():
    for task in (EditAccuracy(num_prompts=40), NextStateAccuracy(num_prompts=40)):
        for prompt in task.prompts():
            assert not task.judge(prompt, [prompt.images[-1]], "")


def test_captions_ask_for_the_target():
    for prompt in T2IAccuracy(num_prompts=20).prompts():
        assert prompt.text == caption(prompt.target)
        assert not prompt.images


def test_edit_sources_hold_only_seen_combinations():
    for prompt in EditAccuracy(num_prompts=40).prompts():
        source = read_scene(prompt.images[0])
        assert source
        assert not any(map(is_held_out, source))


def test_next_state_parts_alternate_and_continue_the_law():
    for prompt in NextStateAccuracy(num_prompts=40).prompts():
        frames = [part for part in prompt.parts if isinstance(part, np.ndarray)]
        texts = [part for part in prompt.parts if isinstance(part, str)]
        assert [isinstance(part, str) for part in prompt.parts] == [False, True] * len(frames)
        assert " ".join(texts) == prompt.text
        assert all(a is b for a, b in zip(frames, prompt.images, strict=True))
        states = [*(read_scene(frame) for frame in frames), prompt.target]
        assert all(state is not None for state in states)
        assert len({frozenset((item.shape, item.color) for item in state) for state in states}) == 1


def test_reconstruction_pictures_are_read_as_their_scene():
    task = ReconstructionAccuracy(num_prompts=60)
    assert all(task.judge(prompt, prompt.images, "") for prompt in task.prompts())


def test_more_one_shape_prompts_than_exist_are_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    task, draws = T2IAccuracy(num_prompts=600), []
    make_prompt = task.make_prompt

    def counted(rng: np.random.Generator, num_items: int, number: int) -> EvaluationPrompt:
        draws.append(num_items)
        return make_prompt(rng, num_items, number)

    monkeypatch.setattr(task, "make_prompt", counted)
    prompts = task.prompts()
    assert len({prompt.text for prompt in prompts}) == 600
    assert len(draws) < 1000, "a draw of a film is a film made"
    assert sum(len(prompt.target) == 1 for prompt in prompts) == sum(map(is_held_out, all_items()))


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    corpora = tmp_path_factory.mktemp("corpora")
    config = CorpusConfig(num_images=300, num_clips=30)
    for dataset in DATASETS:
        if dataset.name in ("shapes_image_text", "shapes_video"):
            write_dataset(dataset, corpora, config)
    return Dictionary(str(corpora), num_clips=30)


def test_frames_are_those_of_the_whole_film() -> None:
    """The task's films end at the last frame that is shown, which leaves it as it is."""
    task, rng = NextStateAccuracy(), np.random.default_rng(4)
    for number in range(20):
        clip, count = random_clip(rng, 2), 1 + number % 2
        whole = mp4_bytes(clip_frames(clip), FRAMES_PER_SECOND)
        expected = [task.shrink(pixels) for pixels in mp4_frames(whole, [rest + 0.5 for rest in range(count)])]
        assert np.array_equal(task.rest_frames(clip, count), expected)


@pytest.mark.parametrize("task", [T2IAccuracy, EditAccuracy, NextStateAccuracy], ids=lambda task: task.name)
def test_a_dictionary_of_300_pictures_answers_what_no_picture_shows(dictionary: Dictionary, task: type[ShapesTask]):
    """The demo's world is made of parts: counting them is enough, and the report says so."""
    asked, prompts = task(num_prompts=40), task(num_prompts=40).prompts()
    assert accuracy_of(dictionary, asked, prompts, list)["accuracy"] > 0.9
    other = accuracy_of(OtherWords(), asked, prompts, lambda changed: dictionary.answers(changed, list))
    assert other["accuracy"] <= 0.1
