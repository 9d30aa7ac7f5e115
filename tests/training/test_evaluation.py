"""Evaluation with a model and tasks made by hand, and the two commands around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from launch.commands import evaluate as evaluate_command
from model.errors import UserError
from model.generation.decoding_config import DecodingConfig
from model.generation.settings import PhaseSampling, SamplingConfig
from training.inference.baselines import FlatPatches, rotated, with_words_of
from training.inference.evaluation import EvaluationPrompt, evaluate, load_task, paired_difference, wilson_interval
from training.inference.prompts import Output, Prompt

TASKS = """
from dataclasses import dataclass
import numpy as np
from training.inference.evaluation import EvaluationPrompt

@dataclass
class Gray:
    name = "gray"
    num_prompts: int = 7
    format: str = "t2i"

    def prompts(self):
        pictures = [np.full((8, 8, 3), n, np.uint8) for n in range(self.num_prompts)]
        if self.format == "interleaved":
            return [EvaluationPrompt(self.format, "", [], [p, str(n)], n, (8, 8)) for n, p in enumerate(pictures)]
        return [EvaluationPrompt(self.format, str(n), [p], [], n, (8, 8)) for n, p in enumerate(pictures)]

    def judge(self, prompt, images, text):
        return len(images) == 1 and int(images[0][0, 0, 0]) == prompt.target

@dataclass
class Explained(Gray):
    def wanted(self, prompt):
        return [np.full((8, 8, 3), prompt.target, np.uint8)]

    def reason(self, prompt, images, text):
        return f"{images[0][0, 0, 0]} for {prompt.target}"
"""


class GrayModel:
    """Draws the brightness that the prompt's words name, and cannot count beyond 4."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.temperatures: list[float] = []  # of the pictures of each call

    def decode_with(self, decoding: DecodingConfig) -> None:
        assert decoding.strategy == "ar", "what the command does unless told"

    def sampling_as_trained(self, given: SamplingConfig) -> SamplingConfig:
        return given

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int = 0, first_index: int = 0
    ) -> list[Output]:
        self.calls.append((len(prompts), first_index))
        self.temperatures.append(sampling.image.temperature)
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: Prompt) -> Output:
        words = prompt.text if prompt.format != "interleaved" else str(prompt.parts[-1])
        image = np.full((8, 8, 3), min(4, int(words)), np.uint8)
        tokens, log_probs = np.zeros(1, np.int64), np.zeros(1, np.float32)
        return Output("words", [image], ["words", image], tokens, log_probs, True)

    def reconstruct(self, images: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]:
        self.calls.append((len(images), -1))
        return list(images)


@pytest.fixture
def tasks_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "hand_made_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "hand_made_tasks.Gray"


def test_a_task_makes_its_prompts_once(tasks_module: str) -> None:
    task = load_task(tasks_module.replace("Gray", "Explained"), {"num_prompts": 2})
    assert task.prompts() is task.prompts(), "they may be videos"
    (wanted,) = task.wanted(task.prompts()[1])  # type: ignore[attr-defined]
    assert (wanted == 1).all()


def test_a_difference_on_the_same_prompts_is_known_better_than_either_accuracy() -> None:
    both = [1.0] * 170 + [0.0] * 20
    found = paired_difference([*both, *[1.0] * 4, *[0.0] * 6], [*both, *[0.0] * 4, *[1.0] * 6])
    assert found["mean"] == pytest.approx(-0.01)
    error = stats.sem([*[0.0] * 190, *[1.0] * 4, *[-1.0] * 6])
    assert found["interval"] == pytest.approx(stats.norm.interval(0.95, loc=-0.01, scale=error), abs=1e-6)
    alone = wilson_interval(174 / 200, 200)
    assert found["interval"][1] - found["interval"][0] < 0.7 * (alone[1] - alone[0])
    assert paired_difference([], []) == {"mean": 0.0, "interval": None}
    assert paired_difference([1.0], [0.0]) == {"mean": 1.0, "interval": None}


def test_what_a_decoder_gains_or_loses_is_told_beside_its_accuracy() -> None:
    figures = {"joint": 1.0, "entropy_ratio": 1.0, "num_forwards": 8.0, "seconds": 0.1}
    ar = figures | {"accuracies": {"drawn": 0.9}}
    differences = {"drawn": {"mean": -0.05, "interval": [-0.06, -0.04]}, "single": {"mean": 1.0, "interval": None}}
    dida = figures | {"accuracies": {"drawn": 0.85, "single": 1.0}, "difference_from_ar": differences}
    told = evaluate_command.render({"checkpoint": "c", "untrained": False, "decoders": {"ar": ar, "dida": dida}})
    assert "ar: drawn 0.900; joint" in told
    assert "dida: drawn 0.850 (to ar -0.050, 95% -0.060 to -0.040), single 1.000 (to ar +1.000); joint" in told


def test_accuracy_is_the_share_of_right_answers(tasks_module: str, tmp_path: Path, capsys) -> None:
    model = GrayModel()
    tasks = {
        "drawn": load_task(tasks_module, {"num_prompts": 7}),
        "continued": load_task(tasks_module, {"format": "interleaved", "num_prompts": 4}),
        "rebuilt": load_task(tasks_module, {"format": "reconstruction", "num_prompts": 3}),
        "empty": load_task(tasks_module, {"num_prompts": 0}),
    }
    results = evaluate(model, tasks, SamplingConfig(), batch_size=3, samples_folder=tmp_path / "samples", num_samples=2)
    assert results["drawn"]["accuracy"] == pytest.approx(5 / 7)
    assert [results[name]["count"] for name in tasks] == [7, 4, 3, 0]
    assert results["drawn"]["scores"] == [1.0] * 5 + [0.0] * 2
    assert results["continued"]["accuracy"] == results["rebuilt"]["accuracy"] == 1.0
    assert results["empty"]["accuracy"] == 0.0
    assert results["empty"]["interval"] == [0.0, 1.0]
    assert model.calls == [(3, 0), (3, 3), (1, 6), (3, 0), (1, 3), (1, -1), (1, -1), (1, -1)]
    first, second = results["drawn"]["samples"]
    assert first["prompt"] == "0"
    assert first["correct"] is True
    assert second["images"] == ["drawn_001_answer_0.png"]
    kept = np.asarray(Image.open(tmp_path / "samples" / second["images"][0]))
    assert kept.shape == (8, 8, 3)
    assert (kept == 1).all()
    assert len(results["continued"]["samples"][0]["prompt_images"]) == 1
    assert (first["wanted_images"], first["reason"]) == ([], "")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "nextstate: evaluate drawn: 3 of 7, 1.000 so far",
        "nextstate: evaluate drawn: 6 of 7, 0.833 so far",
        "nextstate: evaluate drawn: 7 of 7, 0.714 so far",
    ]


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    for (right, count), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(right / count, count) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_tasks_that_cannot_be_made_are_the_users(tasks_module: str) -> None:
    for path in ("no.such.Module", "hand_made_tasks.Missing", "Gray", ""):
        with pytest.raises(UserError, match=r"cannot be imported|no evaluation task named"):
            load_task(path, {})
    with pytest.raises(UserError, match="does not take these arguments"):
        load_task(tasks_module, {"number": 3})


def loads(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Makes `InferenceModel.load` give a `GrayModel`; what it was asked for."""
    seen = SimpleNamespace(model=GrayModel(), checkpoint=None, untrained=None)

    def load(checkpoint: Path, text: str, vision: str, options: object, *, untrained: bool = False):
        seen.checkpoint, seen.untrained = Path(checkpoint), untrained
        return seen.model

    monkeypatch.setattr("training.inference.model.InferenceModel.load", load)
    monkeypatch.setattr("launch.commands.evaluate.check_choice", lambda *_, **__: None)
    return seen


def test_evaluate_command(tasks_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    tasks = {
        "drawn": {"path": tasks_module, "num_prompts": 10},
        "few": {"path": tasks_module.replace("Gray", "Explained")},
    }
    config = evaluate_command.Config(
        checkpoint="sft", run_folder=str(tmp_path), out="evaluation/x.json", tasks=tasks, untrained=True
    )
    answer = evaluate_command.run(config)
    assert seen.checkpoint == tmp_path / "sft"
    assert seen.untrained is True
    assert json.loads((tmp_path / "evaluation/x.json").read_text()) == answer
    assert answer["metrics"] == {"drawn": 0.5, "few": pytest.approx(5 / 7)}
    assert answer["num_prompts"] == 7
    last = [one for one in answer["samples"] if one["group"] == "few"][-1]
    assert last["reason"] == "4 for 6"
    wanted = np.asarray(Image.open(tmp_path / "evaluation" / last["wanted_images"][0]))
    assert (wanted == 6).all()
    assert all((tmp_path / "evaluation" / name).is_file() for name in answer["samples"][0]["images"])
    assert "drawn: 0.500" in evaluate_command.render(answer)


@pytest.mark.parametrize("pixels", [0, 4, 5])
def test_flat_patches_are_the_best_that_one_colour_a_patch_can_do(pixels: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    ((found,),) = FlatPatches(pixels).answers([EvaluationPrompt("reconstruction", images=[image])], list)
    side = pixels or 12
    for y, x, channel in np.ndindex(image.shape):
        top, left = y // side * side, x // side * side
        patch = image[top : top + side, left : left + side, channel]
        assert abs(float(found[y, x, channel]) - float(patch.mean())) <= 0.5


class Right:
    """A baseline that knows all answers but one of its own."""

    def __init__(self, wrong: int):
        self.wrong = wrong

    def answers(self, prompts: Sequence[EvaluationPrompt], ask: object) -> list[list[np.ndarray]]:
        return [[] if p.target == self.wrong else [np.full((8, 8, 3), p.target, np.uint8)] for p in prompts]


def test_baselines_and_what_was_seen(tasks_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    monkeypatch.setattr(f"{tasks_module.rpartition('.')[0]}.Right", Right, raising=False)
    tasks = {"drawn": {"path": tasks_module}, "next": {"path": tasks_module, "format": "interleaved"}}
    baselines: dict[str, dict] = {
        "right": {"path": "hand_made_tasks.Right", "tasks": ["drawn"], "wrong": 2},
        "copy": {"path": "training.inference.baselines.CopyOfTheLast", "tasks": ["next"]},
        "other_words": {
            "path": "training.inference.baselines.OtherWords",
            "tasks": ["drawn", "next"],
            "num_prompts": 4,
        },
    }
    known = {"drawn": {"path": tasks_module, "num_prompts": 5}}
    config = evaluate_command.Config("sft", str(tmp_path), "x.json", tasks, known, baselines)
    answer = evaluate_command.run(config)
    assert answer["seen"]["drawn"]["accuracy"] == 1.0
    assert answer["baselines"] == {
        "drawn": {
            "right": {"accuracy": pytest.approx(6 / 7), "count": 7},
            "other_words": {"accuracy": 0.0, "count": 4},
        },
        "next": {"copy": {"accuracy": 1.0, "count": 7}, "other_words": {"accuracy": 0.0, "count": 4}},
    }
    assert [count for count, _ in seen.model.calls] == [7, 7, 5, 4, 4]
    assert "other words: 0.000 of 4" in evaluate_command.render(answer)
    config.baselines["right"]["tasks"] = ["dawn"]
    config.baselines["copy"]["num_prompts"] = 0
    with pytest.raises(UserError, match=r"copy.num_prompts[\s\S]*no task dawn"):
        evaluate_command.run(config)


def test_tasks_may_have_a_temperature_of_their_own(
    tasks_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = loads(monkeypatch)
    tasks = {"drawn": {"path": tasks_module}, "few": {"path": tasks_module}}
    config = evaluate_command.Config("sft", str(tmp_path), "x.json", tasks, seen=tasks, image_temperatures={"few": 0})
    config.baselines = {"words": {"path": "training.inference.baselines.OtherWords", "tasks": ["drawn", "few"]}}
    config.sampling.image.temperature = 0.7
    evaluate_command.run(config)
    assert seen.model.temperatures == [0.7, 0] * 3  # the tasks, what was seen, the baseline
    config.image_temperatures = {"fewer": 0, "few": -1}
    config.decoders = ["ar"]
    with pytest.raises(UserError, match=r"no task fewer[\s\S]*few: must not be negative[\s\S]*at one temperature"):
        evaluate_command.run(config)


def test_other_words_keep_the_form_of_the_prompt() -> None:
    def clip(number: int, num_texts: int) -> EvaluationPrompt:
        parts = [part for _ in range(num_texts) for part in (np.full(1, number), f"t{number}")]
        return EvaluationPrompt("interleaved", f"t{number}", parts=parts)

    prompts = [clip(0, 1), clip(1, 2), clip(2, 1), clip(3, 2), clip(4, 3)]
    other = [with_words_of(one, two) for one, two in zip(prompts, rotated(prompts), strict=True)]
    assert [one.parts[1::2] for one in other] == [["t2"], ["t3"] * 2, ["t0"], ["t1"] * 2, ["t4"] * 3]
    assert [int(one.parts[0][0]) for one in other] == [0, 1, 2, 3, 4]


def test_evaluate_command_lists_all_problems() -> None:
    config = evaluate_command.Config(
        tasks={"a": {}},
        batch_size=0,
        sampling=SamplingConfig(text=PhaseSampling(top_p=2.0)),
        rollouts={"path": None, "num_rollouts": 2},
    )
    with pytest.raises(UserError) as caught:
        evaluate_command.run(config)
    for key in ("checkpoint", "tasks.a.path", "batch_size", "sampling.text.top_p", "rollouts.path"):
        assert key in str(caught.value)


def test_a_reconstruction_never_asks_the_decoder() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    task = SimpleNamespace(
        name="r",
        prompts=lambda: [EvaluationPrompt("reconstruction", images=[image])],
        judge=lambda prompt, images, text: 0.25,
    )
    model = GrayModel()
    assert evaluate(model, {"r": task}, SamplingConfig())["r"]["accuracy"] == 0.25
    assert model.calls == [(1, -1)]
