"""The words world: what is drawn is read by the real reader, nothing held out is shown, and its curriculum holds together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.words_world import tasks
from examples.words_world.build import WORLD, WordsCorpusConfig
from examples.words_world.writing import CELL, INKS, SHEET, STEP, Writing, color_of, draw, is_held_out, random_writing
from launch.command_line import cli
from launch.composition.compose import compose_config

TRUTH = tasks.Drawn()


def test_a_character_is_two_codes_whatever_stands_beside_it():
    rng = np.random.default_rng(0)
    patches: dict[tuple[str, str, int], set[bytes]] = {}
    for _ in range(400):
        writing = random_writing(rng)
        picture = draw(writing)
        blank = picture[0, 0].tobytes() == picture[-1, -1].tobytes()
        assert picture.shape == (*SHEET, 3)
        assert blank
        for number, character in enumerate(writing.text):
            for half in range(CELL[0] // STEP):
                top, left = (writing.row + half) * STEP, (writing.column + number) * STEP
                patch = picture[top : top + STEP, left : left + STEP]
                patches.setdefault((character, writing.color, half), set()).add(patch.tobytes())
    assert len(patches) == 10 * len(INKS) * 2
    assert all(len(found) == 1 for found in patches.values())
    assert len(set.union(*patches.values())) == len(patches)


def test_the_reader_reads_the_truth_and_nothing_else():
    exact, reward, color = (task(num_prompts=24) for task in (tasks.WordsExact, tasks.WordsTask, tasks.WordsColor))
    prompts = exact.prompts()
    pictures = TRUTH.answers(prompts, list)
    assert sum(exact.judge(*pair, "") for pair in zip(prompts, pictures, strict=True)) >= 23
    assert all(color.judge(*pair, "") for pair in zip(prompts, pictures, strict=True))
    others = list(zip(prompts, [*pictures[1:], pictures[0]], strict=True))
    assert sum(exact.judge(*pair, "") for pair in others) == 0
    assert 0 < np.mean([reward.judge(*pair, "") for pair in others]) < 0.5
    blank = np.full((*SHEET, 3), 250, np.uint8)
    for answer in ([], [blank]):
        assert [task.judge(prompts[0], answer, "") for task in (exact, reward, color)] == [0, 0, 0]
    assert [color_of(draw(Writing("17", name, 0, 3))) for name in INKS] == list(INKS)


def test_texts_that_are_held_out_are_only_evaluated():
    (words, english) = WORLD.datasets
    assert (words.kind, english.kind) == ("image_text", "text")
    captions = [sample["txt"].decode() for sample in words.samples(WordsCorpusConfig(num_images=500))]
    shown = {caption.split('"')[1] for caption in captions}
    questions = tasks.WordsQuestions(num_prompts=500).questions()
    asked = {question.fields["text"] for question in questions}
    assert all(f'"{question.fields["text"]}"' in question.words for question in questions)
    evaluated = {prompt.target.text for prompt in tasks.WordsTask().prompts()}
    assert not any(map(is_held_out, shown | asked))
    assert all(map(is_held_out, evaluated))
    assert {len(text) for text in shown} == {len(text) for text in evaluated} == {2, 3, 4}
    shuffled = tasks.WordsQuestions(num_prompts=500, shuffled=True).questions()
    assert sum(f'"{question.fields["text"]}"' in question.words for question in shuffled) < 25


def test_the_curriculum_holds_together(tmp_path, capsys):
    """What an entry reads is made by one that it waits for, and every stage and evaluation composes."""
    run = f"run_folder={tmp_path}"
    assert cli.main(["curriculum", "curriculum=words", run, "dry_run=true", "json=true"]) == 0
    entries = compose_config("curriculum", ["curriculum=words", run]).entries
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["planned"]] == list(entries)
    stages = {
        name: compose_config("train", one.overrides).stage for name, one in entries.items() if one.command == "train"
    }
    assert (stages["sft"].initialize_from, stages["rl"].initialize_from) == (None, str(tmp_path / "sft"))
    assert list(stages["vision_tokenizer"].objective["data"]["corpora"]) == ["words_image_text"]
    assert stages["sft"].data.datasets["all"].path == str(tmp_path / "packed/sft/all")
    assert stages["rl"].objective["rewards"]["signals"]["ocr"]["options"] == {"one_line": True}
    (height, width), factor = SHEET, 8
    assert stages["vision_tokenizer"].objective["data"]["views"][0]["area"] == height * width
    assert f"image.max_area={height * width}" in entries["tokenize"].overrides
    assert stages["rl"].objective["sampling"]["max_new_tokens"] > height // factor * (width // factor + 1) + 8
    made: dict[str, set[str]] = {}
    for name, entry in entries.items():
        made[name] = set(entry.outputs).union(*(made[needed] for needed in entry.needs))
    assert {"text_tokenizer", "vision_tokenizer", "sft", "rl"} <= made["evaluate_rl"]
    assert {"evaluation/rl_start.json", "evaluation/rl.json"} <= made["report"]


@pytest.mark.parametrize("name", ["words", "words_start"])
def test_evaluations_ask_what_the_report_shows(name):
    from launch.report.reinforcement import ACCURACY_TASK, REWARD_TASK

    asked = compose_config("evaluate", [f"evaluation={name}", "run_folder=R"]).tasks
    loaded = {key: getattr(tasks, entry["path"].rpartition(".")[2])() for key, entry in asked.items()}
    assert all(task.name == key for key, task in loaded.items())
    assert {REWARD_TASK, ACCURACY_TASK} <= loaded.keys()
