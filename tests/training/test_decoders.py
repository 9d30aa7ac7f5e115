"""Statistics that decoders are compared by, and a comparison with a model that answers from a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from model.generation.decoding_config import DecodingConfig, DenoiseConfig
from model.generation.settings import SamplingConfig
from model.generation.strategies import DecodingMetrics
from training.inference.decoders import code_entropy, compare_decoders, joint_agreement
from training.inference.evaluation import EvaluationPrompt
from training.inference.prompts import ComparisonConfig, Output, Prompt


def images(seed: int, count: int = 400, consistent: bool = True, num_textures: int = 4) -> list[np.ndarray]:
    """Images of 4 x 4 codes; all codes of a row are one texture, or each is drawn by itself."""
    rng = np.random.default_rng(seed)
    shape = (count, 4, 1) if consistent else (count, 4, 4)
    return list(np.broadcast_to(rng.integers(0, num_textures, shape), (count, 4, 4)))


def test_joint_agreement_sees_what_single_codes_do_not() -> None:
    reference = images(0)
    assert joint_agreement(images(1), reference) > 0.95
    assert joint_agreement(images(1, consistent=False), reference) < 0.7, "right codes, wrong pairs"
    assert code_entropy(images(1, consistent=False)) == pytest.approx(np.log(4), abs=0.01)
    assert joint_agreement(images(1, num_textures=1), reference) < 0.5
    assert code_entropy(images(1, num_textures=1)) == 0.0
    assert joint_agreement([], reference) == 0.0


@dataclass
class TableModel:
    """Consistent with `ar` and with at least 4 steps, and wrong of every tenth prompt without `ar`; counts as a strategy does."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    decoding_metrics: DecodingMetrics = field(default_factory=DecodingMetrics)

    def decode_with(self, decoding: DecodingConfig) -> None:
        self.decoding, self.decoding_metrics = decoding, DecodingMetrics()

    def generate(
        self, prompts: list[Prompt], sampling: SamplingConfig, seed: int, first_index: int = 0
    ) -> list[Output]:
        is_ar = self.decoding.strategy == "ar"
        self.decoding_metrics.num_forwards += 17 if is_ar else self.decoding.dida.steps + 1
        self.decoding_metrics.num_tokens += 17 * len(prompts)
        self.decoding_metrics.seconds += 1.0 if is_ar else 0.25
        good = is_ar or self.decoding.dida.steps >= 4
        codes = images(seed + (0 if is_ar else 50), len(prompts), good)
        nothing: Any = np.zeros(0)
        right: list[Any] = [
            np.array(is_ar or number % 10 > 0) for number in range(first_index, first_index + len(prompts))
        ]
        return [Output("", [image], [], nothing, nothing, True, [one]) for image, one in zip(right, codes, strict=True)]


class Task:
    name = "task"

    def prompts(self) -> list[EvaluationPrompt]:
        return [EvaluationPrompt("t2i", str(number)) for number in range(200)]

    def judge(self, prompt: EvaluationPrompt, images: list[np.ndarray], text: str) -> bool:
        return bool(images[0])


def test_decoders_are_held_against_token_by_token_decoding() -> None:
    decodings = {"dida": DecodingConfig("dida", DenoiseConfig(steps=4)), "ar": DecodingConfig("ar")}
    found = compare_decoders(
        TableModel(),  # type: ignore[arg-type]
        {"task": Task()},
        SamplingConfig(),
        decodings,
        ComparisonConfig(dida_steps=[1, 4], dida_steps_prompts=100, single_prompts=4),
    )
    ar, dida = found["ar"], found["dida"]
    assert list(found) == ["ar", "dida"]
    assert ar["num_forwards"] == 17
    assert ar["tokens_a_forward"] == 1
    assert dida["num_forwards"] == 5
    assert (ar["seconds"], dida["seconds"]) == (1.0, 0.25)
    assert ar["accuracies"] == {"task": 1.0}
    assert dida["accuracies"] == {"task": pytest.approx(0.9)}
    assert dida["joint"] == pytest.approx(ar["joint"], abs=0.03)
    assert dida["by_steps"]["1"]["joint"] < ar["joint"] - 0.2
    assert dida["by_steps"]["4"]["joint"] == dida["joint"]
    assert dida["by_steps"]["1"]["accuracies"] == {"task": pytest.approx(0.9)}
    assert dida["num_prompts"] == dida["by_steps"]["4"]["num_prompts"] == {"task": 200}
    assert dida["by_steps"]["1"]["num_prompts"] == {"task": 100}
    assert "difference_from_ar" not in ar
    found_difference = dida["difference_from_ar"]["task"]
    assert found_difference["mean"] == pytest.approx(-0.1)
    assert found_difference["interval"] == [pytest.approx(-0.142, abs=1e-3), pytest.approx(-0.058, abs=1e-3)]
    assert dida["entropy_ratio"] == pytest.approx(1.0, abs=0.01)


def test_fewer_steps_keep_their_causal_ones_as_far_as_there_is_room() -> None:
    decodings = {"dida": DecodingConfig("dida", DenoiseConfig(steps=6, causal_steps=4)), "ar": DecodingConfig("ar")}
    model, asked = TableModel(), []
    decode_with = model.decode_with

    def told(decoding: DecodingConfig) -> None:
        asked.append((decoding.dida.steps, decoding.dida.causal_steps))
        decode_with(decoding)

    model.decode_with = told  # type: ignore[method-assign]
    compare_decoders(
        model,  # type: ignore[arg-type]
        {"task": Task()},
        SamplingConfig(),
        decodings,
        ComparisonConfig(dida_steps=[1, 2, 4, 6, 8], single_prompts=4),
    )
    assert asked[-5:] == [(6, 4), (1, 0), (2, 1), (4, 3), (8, 4)]
