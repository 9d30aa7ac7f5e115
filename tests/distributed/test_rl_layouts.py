"""Rollouts and updates: trainer and sampler agree, and no layout, batch or split of them changes what is learnt."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from rl_runs import (
    gradient_of_forced,
    offloaded_rollout,
    one_rollout,
    reference_is_the_start,
    steps,
    steps_with_a_guard,
    trained_by_the_conditional_alone,
)
from rl_world import rl_config, with_layout, write_tokenizer

from model.config import AdapterConfig
from training.contracts.zero import DeepSpeedConfig

GUIDED = {"sampling": {"max_new_tokens": 24, "guidance_scale": 3.0, "image": {"temperature": 1.5}}}
LAYOUTS = {"tensor": {"tensor": 2}, "data": {"data": 2}, "tensor_data": {"tensor": 2, "data": 2}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("rl"))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
def test_trainer_and_sampler_agree_before_the_first_step(
    pool: Any, tokenizer: Path, tmp_path: Path, options: dict[str, Any], tensor: int
) -> None:
    config = with_layout(rl_config(tokenizer, tmp_path, **options), tensor=tensor)
    for _, parity in pool.run(one_rollout, config, ranks=tensor):
        assert parity.num_tokens == 8 * 6  # the codes: all else of these answers is forced
        assert parity.largest <= 1e-5


def test_they_agree_with_adapters(pool: Any, tokenizer: Path, tmp_path: Path) -> None:
    answers = []
    for tensor in (1, 2):
        config = with_layout(rl_config(tokenizer, tmp_path), tensor=tensor)
        config.model.adapter = AdapterConfig(rank=2, alpha=2.0)
        for found, parity in pool.run(one_rollout, config, ranks=tensor):
            assert parity.largest <= 1e-5
            answers.append(found)
    config.model.adapter = AdapterConfig()
    without, _ = pool.run(one_rollout, config, ranks=2)[0]
    assert answers[0] != without, "the adapters do something"
    assert answers[1] == answers[2]


def test_guidance_that_the_trainer_does_not_see_is_refused(pool: Any, tokenizer: Path, tmp_path: Path) -> None:
    (message,) = pool.run(trained_by_the_conditional_alone, rl_config(tokenizer, tmp_path, **GUIDED), ranks=1)
    assert "trainer and sampler do not agree" in message
    assert float(message.partition("got:")[2].partition("mean ")[2].partition(",")[0]) > 0.1


def test_forced_tokens_have_no_gradient_at_all(pool: Any, tokenizer: Path, tmp_path: Path) -> None:
    ((forced, sampled, num_forced),) = pool.run(gradient_of_forced, rl_config(tokenizer, tmp_path), ranks=1)
    assert num_forced == 8 * 7
    assert forced == 0.0
    assert sampled > 0.01


@pytest.fixture(scope="module")
def alone(pool: Any, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    config = with_layout(rl_config(tokenizer, tmp_path_factory.mktemp("alone"), kl_weight=0.0), micro_batch_size=8)
    (results,) = pool.run(steps, config, 3, ranks=1)
    assert any(result.metrics["groups_dropped"] == 0 for result in results)
    return results


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["micro_batches", *LAYOUTS])
def test_what_is_learnt_does_not_depend_on_the_layout(
    pool: Any, tokenizer: Path, tmp_path: Path, alone: list[Any], layout: dict[str, Any]
) -> None:
    config = with_layout(rl_config(tokenizer, tmp_path), **layout)
    check_same_steps(pool.run(steps, config, 3, ranks=config.parallel.world_size), alone)


def test_nor_on_the_engine(pool: Any, tokenizer: Path, tmp_path: Path, alone: list[Any]) -> None:
    """Under ZeRO-3 with offload: sampling, the parity of trainer and sampler, and updates."""
    config = with_layout(rl_config(tokenizer, tmp_path), data=2)
    config.engine, config.deepspeed = "deepspeed", DeepSpeedConfig(3, "cpu", live_elements=0, persistent_elements=0)
    check_same_steps(pool.run(steps, config, 3, ranks=2), alone)


def check_same_steps(by_rank: list[list[Any]], alone: list[Any]) -> None:
    for results in by_rank:
        for found, expected in zip(results, alone, strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
            assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
            for name in ("reward", "tokens_learnt", "answers", "groups_dropped"):
                assert found.metrics[name] == pytest.approx(expected.metrics[name]), name


def test_the_reference_takes_the_place_of_the_weights_for_a_moment(pool: Any, tokenizer: Path, tmp_path: Path) -> None:
    ((same, differs),) = pool.run(reference_is_the_start, rl_config(tokenizer, tmp_path), ranks=1)
    assert all(same)
    assert differs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_only_updates_need_is_away_while_answers_are_drawn(
    pool: Any, tokenizer: Path, tmp_path: Path, dtype: str
) -> None:
    config = with_layout(rl_config(tokenizer, tmp_path), data=2, distributed_optimizer=True)
    config.model.dtype = dtype
    for held, is_same in pool.run(offloaded_rollout, config, ranks=2):
        assert len(held) >= (4 if dtype == "bfloat16" else 3)  # a buffer of gradients, moments, master weights
        assert set(held) == {0}
        assert is_same


def test_offloading_changes_nothing_that_is_learnt(
    pool: Any, tokenizer: Path, tmp_path: Path, alone: list[Any]
) -> None:
    config = with_layout(rl_config(tokenizer, tmp_path, offload=True), micro_batch_size=8)
    (results,) = pool.run(steps, config, 3, ranks=1)
    for found, expected in zip(results, alone, strict=True):
        assert (found.loss, found.gradient_norm) == (expected.loss, expected.gradient_norm)


def test_a_guard_that_falls_while_the_reward_rises_is_told(pool: Any, tokenizer: Path, tmp_path: Path) -> None:
    config = rl_config(tokenizer, tmp_path)
    dark = {"path": "rl_world.Bright", "options": {"sign": -1.0}, "range": [-1.0, 0.0], "guard": True}
    config.stage.objective["rewards"]["signals"]["dark"] = dark
    ((rewards, alarms, kept),) = pool.run(steps_with_a_guard, config, 5, ranks=1)
    assert alarms == [0, *(int(after > before) for before, after in itertools.pairwise(rewards))]
    assert sum(alarms) > 0
    assert kept["reward"] == rewards[-2:]
    assert kept["t2i/dark"] == pytest.approx([11 - reward for reward in rewards[-2:]])
