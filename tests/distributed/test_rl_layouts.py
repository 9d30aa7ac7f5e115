"""Rollouts and updates: trainer and sampler agree, and no layout, batch or split of them changes what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rl_runs import gradient_of_forced, one_rollout, reference_is_the_start, steps, trained_by_the_conditional_alone
from rl_world import rl_config, with_layout, write_tokenizer

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
