"""`distill`: what a model answers becomes the documents that training on them would have, the good answers only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rl_world import Bright
from toy_inference import TEXT_SIZE, TEXTS, VOCABULARY, HashDecoder, toy_model

from data_pipeline.documents.builder import DocumentBuilder, MalformedImageError, Part, Picture, Text, Thought
from data_pipeline.documents.tokenizers import SentencePieceTokenizer, train_sentencepiece
from data_pipeline.packing.pool import Pool
from data_pipeline.storage.format import read_manifest
from data_pipeline.storage.token_files import TokenFileReader
from launch.command_line import cli
from launch.generation.distill_inputs import load_judges, load_prompts
from launch.generation.distill_options import DistillOptions
from launch.generation.distillation import Distiller
from model.errors import Problems, UserError
from model.generation.settings import PhaseSampling, SamplingConfig
from training.objectives.grpo.grpo_options import PromptsEntry
from training.rewards.system import RewardEntry, RewardsConfig

PROMPTS = {"t2i": PromptsEntry("rl_world.Words"), "x2i": PromptsEntry("rl_world.Words", {"with_picture": True})}
BRIGHT = RewardsConfig({"bright": RewardEntry("rl_world.Bright", range=[0.0, 1.0])})
OPTIONS = DistillOptions(
    source="own",
    answers_a_prompt=4,
    kept_a_prompt=2,
    rewards=BRIGHT,
    smallest_reward=5.3,
    prompts_a_file=2,
    sampling=SamplingConfig(PhaseSampling(1.0), PhaseSampling(1.0), max_new_tokens=40),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("text")
    train_sentencepiece(TEXTS, folder, TEXT_SIZE)
    return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())


def distiller(tokenizer: SentencePieceTokenizer, target: Path, **changes: Any) -> Distiller:
    options = dataclasses.replace(OPTIONS, **changes)
    prompts = load_prompts(PROMPTS)
    return Distiller(
        options, toy_model(tokenizer, HashDecoder()), prompts, load_judges(options.rewards, prompts), target
    )


def documents(prefix: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    reader = TokenFileReader(prefix)
    return [(reader.tokens(index), reader.segments(index)) for index in range(len(reader))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("image_format", ["emu35", "emu3"])
def test_an_answer_is_laid_out_as_a_document_of_training(tokenizer: Any, seed: int, image_format: str) -> None:
    rng = np.random.default_rng(seed)
    builder = DocumentBuilder(VOCABULARY, tokenizer, image_format)
    pictures = [Picture(rng.integers(0, 64, rng.integers(1, 4, 2))) for _ in range(3)]
    response: list[Part] = [Thought("it moves"), Text("a red circle"), pictures[0], Text("it moves right"), pictures[1]]
    response = response[int(rng.integers(0, 4)) :]
    expected = builder.chat(7, "x2i", "make the circle blue", pictures[2:], response)
    prompt = builder.chat_prompt("x2i", "make the circle blue", pictures[2:])
    answer = expected.tokens[len(prompt) :].tolist()
    for cut in (0, 1, 2):  # generation may end behind the picture, ESS or EOS
        found = builder.answered(7, prompt, answer[: len(answer) - cut], "x2i")
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.segments, expected.segments)
    plain = builder.interleaved(7, response)
    begun = builder.interleaved_prompt(response[:-1])
    found = builder.answered(7, begun, plain.tokens[len(begun) :].tolist())
    assert np.array_equal(found.tokens, plain.tokens)
    assert np.array_equal(found.segments, plain.segments)
    with pytest.raises(MalformedImageError):
        builder.answered(7, prompt, [*builder.image_block(pictures[0].codes)[:-2].tolist(), VOCABULARY.ess])


def test_the_best_answers_become_documents_that_pack_reads(tokenizer: Any, tmp_path: Path) -> None:
    work = distiller(tokenizer, tmp_path)
    manifests = [work.manifest(number) for number in range(work.num_files)]
    assert [manifest["num_documents"] > 0 for manifest in manifests] == [True] * 3
    pool = Pool({"own": [tmp_path]})
    assert len(pool) == sum(manifest["num_documents"] for manifest in manifests)
    kept = [codes for number in range(3) for codes in self_drawn(work, number)]
    # By hand: all answers once more, judged one by one.
    expected, counts = [], {"low_reward": 0, "not_the_best": 0}
    for number, (_, question) in enumerate(work.prompts):
        draws = range(4 * number, 4 * number + 4)
        asked = work.model.ask([question.prompt] * 4, OPTIONS.sampling, 0, draws)
        drawn = [output.codes[0] for output in work.model.outputs([one.generation for one in asked])]
        rewards = [1 + 9 * float(work.model.picture(codes).mean()) / 255 for codes in drawn]
        good = sorted((index for index in range(4) if rewards[index] >= 5.3), key=lambda index: -rewards[index])
        counts["low_reward"] += 4 - len(good)
        counts["not_the_best"] += len(good[2:])
        expected += [drawn[index] for index in good[:2]]
    assert len(kept) == len(expected)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(kept, expected, strict=True))
    for reason, count in counts.items():
        assert count > 0, "the test sees answers of every kind"
        assert sum(manifest["quarantined"][reason] for manifest in manifests) == count


def self_drawn(work: Distiller, number: int) -> list[np.ndarray]:
    """Codes of the part of each document that has loss."""
    found = []
    for tokens, segments in documents(work.prefix(number)):
        picture = segments[(segments["grid_height"] > 0) & (segments["flags"] & 4 == 0)][0]
        block = tokens[picture["start"] : picture["start"] + picture["length"]]
        codes = work.model.vocabulary.ids_to_codes(block[work.model.vocabulary.is_visual(block)])
        found.append(codes.reshape(picture["grid_height"], picture["grid_width"]))
    return found


def test_a_job_goes_on_where_it_was(tokenizer: Any, tmp_path: Path) -> None:
    work = distiller(tokenizer, tmp_path)
    for number in range(work.num_files):
        work.manifest(number)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000001.json").unlink()
    again, calls = distiller(tokenizer, tmp_path), Bright.num_calls
    again.check_target()
    assert [again.is_done(number) for number in range(3)] == [True, False, True]
    for number in range(3):
        again.manifest(number)
    assert Bright.num_calls == calls + 1, "one file is judged again"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for changes in ({"seed": 1}, {"smallest_reward": 5.0}, {"rewards": RewardsConfig(), "smallest_reward": 1.0}):
        with pytest.raises(UserError, match="token files of another call"):
            distiller(tokenizer, tmp_path, **changes).check_target()
    with pytest.raises(UserError, match="token files of another call"):
        Distiller(OPTIONS, work.model, work.prompts[:2], work.rewards, tmp_path).check_target()


def test_answers_that_are_not_whole_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    short = dataclasses.replace(OPTIONS.sampling, max_new_tokens=8)
    work = distiller(tokenizer, tmp_path, rewards=RewardsConfig(), smallest_reward=1.0, sampling=short)
    found = work.manifest(0)
    assert (found["num_documents"], found["quarantined"]["not_whole"]) == (0, 8)
    assert read_manifest(work.prefix(0), "tokens")["num_tokens"] == 0


def test_what_cannot_be_distilled_is_told(tmp_path: Path, capsys: Any) -> None:
    call = ["distill", "checkpoint=x", f"target={tmp_path}"]
    for wrong, message in (
        ([], "prompts"),
        (["prompts.t2i.path=rl_world.Words", "smallest_reward=8"], "nothing judges the answers"),
        (["prompts.t2i.path=rl_world.Words", "kept_a_prompt=2"], "more than are drawn"),
        (["prompts.t2i.path=rl_world.Words", "part=2", "num_parts=2"], "no part 2"),
    ):
        assert cli.main([*call, *wrong]) == 2
        assert message in capsys.readouterr().err
    problems = Problems()
    dataclasses.replace(OPTIONS, prompts_a_file=0, smallest_reward=11.0).validate_distill(problems)
    assert [text.split(":")[0] for text in problems.found] == ["prompts_a_file", "smallest_reward"]
