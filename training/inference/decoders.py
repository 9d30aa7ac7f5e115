"""Strategies of decoding held against one another: quality, joint structure, diversity, forward passes, time.

Accuracies alone do not tell a parallel decoder's faults: independent draws may make each code right and the image
inconsistent, and a greedy one is consistent and always the same. So two statistics of sampled codes stand beside them,
both against token-by-token decoding of the same prompts at the same temperature:

- joint: 1 - total variation between the distributions of neighbouring codes (right and below) and that of a second sample
  of token-by-token decoding; its own value is that of two such samples, the most that a sample of this size can reach;
- entropy: of the distribution of single codes, in nats.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from model.generation.decoding_config import DecodingConfig
from model.generation.settings import SamplingConfig
from training.inference.evaluation import EvaluationTask, evaluate, paired_difference
from training.inference.model import InferenceModel
from training.inference.prompts import ComparisonConfig, Prompt

SECOND_SAMPLE = 1  # added to the seed
# Of each number of steps.
STEPS_FIGURES = ("accuracies", "num_prompts", "joint", "entropy", "entropy_ratio", "images_per_second")


def compare_decoders(
    model: InferenceModel,
    tasks: Mapping[str, EvaluationTask],
    sampling: SamplingConfig,
    decodings: Mapping[str, DecodingConfig],
    config: ComparisonConfig,
    *,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The statistics' prompts are those of the first task that asks for new pictures.

    By decoder: `accuracies` and `num_prompts` by task, `joint`, `entropy`, `entropy_ratio`, `num_forwards` and `seconds` of an image at
    batch 1, `images_per_second` in batches; for dida `by_steps`, with accuracies of fewer prompts. `ar` comes first: the others are held against it,
    with `difference_from_ar` by task, of accuracies on the same prompts.
    """
    prompts = statistics_prompts(tasks, config.statistics_prompts)
    drawn = replace(sampling, image=replace(sampling.image, temperature=config.statistics_temperature))
    model.decode_with(DecodingConfig("ar"))
    second = sampled_codes(model, prompts, drawn, seed + SECOND_SAMPLE)
    found: dict[str, dict[str, Any]] = {}
    of_ar: dict[str, dict[str, Any]] = {}
    for name in sorted(decodings, key=lambda name: name != "ar"):
        model.decode_with(decodings[name])
        results = evaluate(model, tasks, sampling, batch_size=batch_size, seed=seed)
        measured = statistics(model, prompts, drawn, seed, second)
        ratio = measured["entropy"] / found["ar"]["entropy"] if "ar" in found else 1.0
        found[name] = {
            **quality(results),
            **measured,
            "entropy_ratio": ratio,
            **one_at_a_time(model, prompts[: config.single_prompts], drawn, seed),
        }
        if name == "ar":
            of_ar = results
        else:
            found[name]["difference_from_ar"] = differences(results, of_ar)
    if "dida" in found:
        found["dida"]["by_steps"] = by_steps = {}
        for steps in config.dida_steps:
            if steps == decodings["dida"].dida.steps:  # the same draws: measured already
                by_steps[str(steps)] = {name: found["dida"][name] for name in STEPS_FIGURES}
                continue
            measured = steps_statistics(model, decodings["dida"], steps, prompts, drawn, seed, second, found)
            few = config.dida_steps_prompts
            results = evaluate(model, tasks, sampling, batch_size=batch_size, seed=seed, most_prompts=few)
            by_steps[str(steps)] = measured | quality(results)
    return found


def quality(results: Mapping[str, Any]) -> dict[str, Any]:
    """By task."""
    return {
        "accuracies": {task: result["accuracy"] for task, result in results.items()},
        "num_prompts": {task: result["count"] for task, result in results.items()},
    }


def differences(results: Mapping[str, Any], of_ar: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By task; both decoders were asked the same prompts."""
    return {task: paired_difference(result["scores"], of_ar[task]["scores"]) for task, result in results.items()}


def steps_statistics(
    model: InferenceModel,
    decoding: DecodingConfig,
    steps: int,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    second: Sequence[np.ndarray],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    model.decode_with(replace(decoding, dida=decoding.dida.with_steps(steps)))
    measured = statistics(model, prompts, sampling, seed, second)
    return measured | {"entropy_ratio": measured["entropy"] / found["ar"]["entropy"]}


def statistics_prompts(tasks: Mapping[str, EvaluationTask], count: int) -> list[Prompt]:
    for task in tasks.values():
        asked = [prompt for prompt in task.prompts() if prompt.format != "reconstruction"][:count]
        if asked:
            return [Prompt(one.format, one.text, one.images, one.parts, one.image_size) for one in asked]
    return []


def sampled_codes(
    model: InferenceModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
) -> list[np.ndarray]:
    """Codes int64 [H, W] of every image in the answers."""
    return [codes for output in model.generate(prompts, sampling, seed) for codes in output.codes]


def statistics(
    model: InferenceModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, second: Sequence[np.ndarray]
) -> dict[str, Any]:
    started = time.perf_counter()
    codes = sampled_codes(model, prompts, sampling, seed)
    seconds = time.perf_counter() - started
    return {
        "joint": joint_agreement(codes, second),
        "entropy": code_entropy(codes),
        "images_per_second": len(codes) / seconds,
    }


def one_at_a_time(
    model: InferenceModel, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
) -> dict[str, Any]:
    """Means over prompts asked alone; the seconds are those of decoding, without the vision tokenizer."""
    before = replace(model.decoding_metrics)
    for number, prompt in enumerate(prompts):
        model.generate([prompt], sampling, seed, number)
    spent, count = model.decoding_metrics, max(1, len(prompts))
    forwards, tokens = spent.num_forwards - before.num_forwards, spent.num_tokens - before.num_tokens
    return {
        "num_forwards": forwards / count,
        "tokens_a_forward": tokens / max(1, forwards),
        "seconds": (spent.seconds - before.seconds) / count,
    }


def joint_agreement(codes: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """1 - total variation of the distributions of neighbouring codes, mean over the two directions."""
    agreements = []
    for rows, columns in ((0, 1), (1, 0)):
        mine, theirs = (pair_shares(images, rows, columns) for images in (codes, others))
        agreements.append(sum(min(share, theirs.get(pair, 0.0)) for pair, share in mine.items()))
    return float(np.mean(agreements))


def pair_shares(images: Sequence[np.ndarray], rows: int, columns: int) -> dict[tuple[int, int], float]:
    """Share of each pair (code, code `rows` below and `columns` to the right of it)."""
    pairs = [
        np.stack((codes[: len(codes) - rows, : codes.shape[1] - columns], codes[rows:, columns:]), -1).reshape(-1, 2)
        for codes in images
    ]
    values, counts = np.unique(np.concatenate(pairs or [np.empty((0, 2), np.int64)]), axis=0, return_counts=True)
    total = max(1, int(counts.sum()))
    return {(int(a), int(b)): int(n) / total for (a, b), n in zip(values, counts, strict=True)}


def code_entropy(images: Sequence[np.ndarray]) -> float:
    """Of the distribution of single codes, in nats."""
    _, counts = np.unique(np.concatenate([np.empty(0, np.int64), *map(np.ravel, images)]), return_counts=True)
    shares = counts / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())
