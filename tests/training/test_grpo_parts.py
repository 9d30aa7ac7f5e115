"""Prompts, rows, the bank and what is refused before anything starts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.composition.compose import compose_config
from model.errors import UserError
from model.generation.grammar import HEADER_SIZE, Phase
from model.vocabulary import Vocabulary, VocabularyConfig
from training.objectives.grpo.bank import Bank, Round, joined
from training.objectives.grpo.grpo_options import PromptsEntry
from training.objectives.grpo.questions import PromptFile, QuestionOrder
from training.objectives.grpo.rows import IMAGE, TEXT, Sample, micro_batch, segments_of
from training.stage import validate

VOCABULARY = Vocabulary.from_config(VocabularyConfig(text_size=20, visual_size=8, pad_multiple=16))
V = VOCABULARY


def sample(seed: int, num_images: int = 1, guided: bool = False) -> Sample:
    """An answer of texts and images of 1 x 2 codes; what the grammar would have forced is so marked."""
    random = np.random.default_rng(seed)
    ids, phases = [], []
    for _ in range(num_images):
        codes = (V.visual_start + random.integers(0, 8, 2)).tolist()
        ids += [3, V.boi, 1, V.img, *codes, V.eoi]
        phases += [Phase.TEXT, Phase.TEXT, Phase.HEIGHT, Phase.WIDTH, Phase.CODES, Phase.CODES, Phase.IMAGE_END]
    numbers = np.array(phases, np.int32) * 2**HEADER_SIZE
    sampled = np.isin(phases, (Phase.TEXT, Phase.CODES))
    log_probs = np.where(sampled, -random.random(len(ids)), 0.0).astype(np.float32)
    prompt = random.integers(0, 20, int(random.integers(1, 6))).astype(np.int32)
    free = np.array([7, 8] if guided else [], np.int32)
    return Sample(prompt, free, np.array(ids, np.int32), log_probs, sampled, numbers, True)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=4), st.booleans(), st.integers(1, 5), st.integers(0, 99))
def test_rows_hold_every_token_of_every_answer_once(images: list[int], guided: bool, multiple: int, seed: int) -> None:
    samples = [sample(seed + row, count, guided) for row, count in enumerate(images)]
    advantages = [None if row == 1 else float(row + 1) for row in range(len(samples))]
    numbers = sorted({number for one in samples for number in one.mask_numbers.tolist()})
    set_of = {number: index for index, number in enumerate(numbers)}
    batch = micro_batch(samples, advantages, set_of, (0.5, 2.0), V, multiple)
    assert len(batch.tokens) % multiple == 0
    assert batch.bounds[0] == 0
    assert batch.bounds[-1] == len(batch.tokens)
    for one, advantage, place in zip(samples, advantages, batch.answers, strict=True):
        first = place[0] - len(one.prompt) + 1 if len(place) else 0
        assert batch.labels[place].tolist() == one.ids.tolist()
        for index, at in enumerate(place.tolist()):  # each token is predicted from all before it
            before = [*one.prompt.tolist(), *one.ids.tolist()[:index]]
            assert batch.tokens[first : at + 1].tolist() == before
            assert batch.position_ids[first : at + 1].tolist() == list(range(len(before)))
            is_code = VOCABULARY.is_visual(one.ids[index])
            assert batch.learnt[at] == (one.sampled[index] and advantage is not None)
            assert batch.fields["modality"][at] == (IMAGE if is_code else TEXT)
            assert batch.fields["temperature"][at] == (2.0 if is_code else 0.5)
            assert numbers[batch.fields["allowed"][at]] == one.mask_numbers[index]
            partner = int(batch.fields["partner"][at])
            assert (partner >= 0) == (guided and is_code)
            if partner >= 0:  # the stream without the condition has read the images only
                start = int(batch.bounds[batch.bounds <= partner].max())
                image_tokens = [token for token in one.ids.tolist()[:index] if token != 3]
                assert batch.tokens[start : partner + 1].tolist() == [7, 8, *image_tokens]
    learnt = sum(int(one.sampled.sum()) for one, advantage in zip(samples, advantages, strict=True) if advantage)
    assert batch.learnt.sum() == learnt


def test_an_image_is_a_segment() -> None:
    assert segments_of(sample(0, 2), V).tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    from_the_start = replace(sample(0), ids=sample(0).ids[1:])
    assert segments_of(from_the_start, V).tolist() == [0] * 6


def made_round(seed: int, count: int) -> Round:
    random = np.random.default_rng(seed)
    signals = random.random((count, 2))
    signals[::2, 0] = np.nan
    samples = [sample(seed + row, row % 3, guided=True) for row in range(count)]
    return Round(samples, random.random(count), signals, np.ones((count, 2)), ["t2i"] * count, {"tokens": count})


def test_a_round_is_the_same_behind_the_bank(tmp_path: Path) -> None:
    bank, content = Bank(tmp_path, 1, keep=2), made_round(3, 5).to_bytes()
    bank.write(7, "round_0", "key", content)
    assert bank.read(7, "round_0", "key") == content
    assert bank.read(7, "round_0", "of another seed") is None
    assert bank.read(8, "round_0", "key") is None
    assert Bank(tmp_path, 0, keep=2).read(7, "round_0", "key") is None
    found, expected = Round.from_bytes(content), made_round(3, 5)
    for one, other in zip(found.samples, expected.samples, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(one, name), value)
    np.testing.assert_array_equal(found.signals, expected.signals)
    both = joined([Round.from_bytes(Round.empty(2).to_bytes()), found, expected], 2)
    assert len(both.samples) == len(both.totals) == len(both.tasks) == 10
    assert both.about == {"tokens": 10}


def test_a_damaged_file_of_the_bank_is_not_read(tmp_path: Path) -> None:
    bank = Bank(tmp_path, 0, keep=1)
    bank.write(1, "round_0", "key", made_round(1, 4).to_bytes())
    (path,) = tmp_path.rglob("*.zip")
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:200] + b"\xff" * 50 + whole[250:]):
        path.write_bytes(damage)
        assert bank.read(1, "round_0", "key") is None
    bank.write(4, "round_0", "key", b"x")
    bank.forget_before(3)
    assert [one.name for one in tmp_path.iterdir()] == ["00000004"]


def order(folder: Path, seed: int = 1, **weights: float) -> QuestionOrder:
    entries = {}
    for task, weight in weights.items():
        lines = [json.dumps({"text": f"{task} {number}"}) for number in range(6)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
        entries[task] = PromptsEntry("file", {"path": str(folder / f"{task}.jsonl")}, weight)
    return QuestionOrder(entries, seed)


def test_tasks_stand_in_every_batch_by_their_weights_and_prompts_come_in_turn(tmp_path: Path) -> None:
    places = order(tmp_path, a=3.0, b=1.0, c=0.0).take(0, 48)
    for first in range(0, 48, 4):
        assert Counter(place.task for place in places[first : first + 4]) == {"a": 3, "b": 1}
    words = [place.question.words for place in places if place.task == "a"]
    laps = [words[first : first + 6] for first in range(0, 36, 6)]
    assert all(len(set(lap)) == 6 for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1
    again = order(tmp_path, a=3.0, b=1.0).take(17, 5)  # a function of (seed, number)
    assert [one.question.words for one in again] == [one.question.words for one in places[17:22]]
    assert order(tmp_path, seed=2, a=1.0).take(0, 6) != order(tmp_path, seed=1, a=1.0).take(0, 6)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not a JSON object"),
        ('{"text": ""}', "not a prompt"),
        ('{"prompt": "x"}', "not a prompt"),
        ('{"text": "x", "sise": 3}', "unknown keys"),
        ('{"text": "x", "format": "story"}', "unknown format"),
        ('{"text": "x", "images": ["none.png"]}', "cannot be read"),
        ('{"text": "x", "images": ["a\\u0000.png"]}', "cannot be read"),
        ("[" * 100_000, "not a JSON object"),
        ('{"text": "x", "images": [5]}', "does not fit"),
        ('{"text": "x", "image_size": "8"}', "does not fit"),
        ('{"text": "x", "image_size": [8, null]}', "does not fit"),
        ('{"text": "x", "fields": []}', "does not fit"),
        ('{"text": "half a pair: \\ud800"}', "does not fit"),
    ],
)
def test_a_bad_prompt_is_told_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    # A line separator inside of a text ends no line.
    (tmp_path / "p.jsonl").write_text('{"text": "go\u2028od"}\n' + line + "\n")
    with pytest.raises(UserError, match=told) as error:
        PromptFile(str(tmp_path / "p.jsonl")).questions()
    assert "line 2" in str(error.value)


def test_a_prompt_without_a_task_is_refused_where_tasks_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a", "task": "x2i"}\n{"text": "b", "task": "t2i"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match="without a task"):
        PromptFile(str(tmp_path / "p.jsonl"), task="t2i").questions()
    assert len(PromptFile(str(tmp_path / "p.jsonl")).questions()) == 3


REFUSED = {
    "parallel.pipeline=2": "the whole depth of the model on each rank",
    "parallel.context=2": "one row of one rank",
    "stage.global_batch_size=60": "not a multiple of 8",
    "stage.objective.sampling.image.top_k=64": "draw from the whole distribution",
    "stage.objective.sampling.text.temperature=0": "greedy answers are all the same",
    "stage.objective.sampling.max_new_tokens=200": "leaves no room for a prompt",
    "stage.objective.rewards.signals.scene.path=seen": "there is no reward",
    "stage.objective.rewards.signals.scene.weight=0": "nothing to learn from",
    "stage.objective.prompts.t2i.weight=0": "no task has a weight",
    "stage.initialize_from=null": "a model that answers",
    "model.dropout=0.1": "another one than the sampler's",
    "stage.data.prefetch_batches=4": "has no effect",
}


def test_what_cannot_work_is_refused_before_anything_starts_and_all_at_once() -> None:
    toy = ["model=toy", "stage=toy_rl"]
    validate(compose_config("train", toy))
    with pytest.raises(UserError) as error:
        validate(compose_config("train", [*toy, *REFUSED]))
    for told in REFUSED.values():
        assert told in str(error.value)


def test_a_folder_of_rollouts_that_another_rank_removes_meanwhile_is_no_failure(tmp_path: Path, monkeypatch) -> None:
    bank = Bank(tmp_path, data_parallel_rank=0, keep=0)
    bank.write(0, "answers", "key", b"content")
    unlink = Path.unlink

    def unlink_and_lose_the_folder(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        path.parent.rmdir()

    monkeypatch.setattr(Path, "unlink", unlink_and_lose_the_folder)
    bank.forget_before(1)
    assert not list(tmp_path.iterdir())
