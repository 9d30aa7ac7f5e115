"""AdamW as it should be: which parameters decay, and the same weights as torch's after many steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import ROW_TOKENS, device_of_the_count, steps_without_gradient, train_config, train_from
from qwen3_checkpoints import NUM_IDS, config_of, our_tensors, transformers_model

from training.config import OptimizerConfig, TrainConfig

RATE, DECAY = 0.01, 0.5
SPARED_LAYOUTS = {
    "one_process": ("float32", {"distributed_optimizer": False}),
    "distributed": ("float32", {"data": 2}),
    "bfloat16": ("bfloat16", {"data": 2}),
    "tensor_pipeline": ("bfloat16", {"tensor": 2, "pipeline": 2, "distributed_optimizer": False}),
}


def with_optimizer(config: TrainConfig, **changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, **changes)
    return replace(config, stage=replace(config.stage, optimizer=optimizer))


@pytest.mark.parametrize(("dtype", "layout"), SPARED_LAYOUTS.values(), ids=SPARED_LAYOUTS)
def test_without_gradient_norms_stay_and_all_else_decays(pool: Any, dtype: str, layout: dict[str, Any]) -> None:
    """Float32 values: the weights themselves, the optimizer's master weights where the model is bfloat16."""
    config, num_steps = with_optimizer(train_config(dtype=dtype, **layout)), 5
    before, after = pool.run(steps_without_gradient, config, num_steps, ranks=config.parallel.world_size)[0]
    kind = "model/" if dtype == "float32" else "optimizer/master/"
    names = [key for key in before if key.startswith(kind)]
    spared = [key for key in names if before[key].dim() == 1]
    assert len(names) == 3 + 4 * 8  # two embeddings and the final norm; eight parameters in each of four layers
    assert len(spared) == 1 + 4 * 4
    assert all("norm" in key for key in spared)
    for key in names:
        if key in spared:
            assert torch.equal(after[key], before[key]), key
        else:
            expected = before[key].double() * (1 - RATE * DECAY) ** num_steps
            torch.testing.assert_close(after[key].double(), expected, rtol=num_steps * 2.0**-23, atol=0.0, msg=key)


def test_the_count_of_steps_lies_where_its_parameter_is(pool: Any) -> None:
    """As the fused step of a GPU wants it; torch's meta device stands for one."""
    assert pool.run(device_of_the_count, "meta", ranks=1)[0] == "meta"


def random_rows(num_rows: int, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Rows of one document each, all labels counting differently."""
    rows = []
    for _ in range(num_rows):
        tokens = (np.arange(ROW_TOKENS) * 5 + rng.integers(0, 9) + rng.integers(0, 3, ROW_TOKENS)) % NUM_IDS
        weights = rng.choice([0.0, 0.5, 1.0], ROW_TOKENS)
        weights[-1] = 0.0
        rows.append(
            {
                "tokens": tokens,
                "labels": np.roll(tokens, -1),
                "loss_weights": weights,
                "loss_classes": np.zeros(ROW_TOKENS),
                "sources": np.zeros(ROW_TOKENS),
                "position_ids": np.arange(ROW_TOKENS),
                "bounds": np.array([0, ROW_TOKENS]),
            }
        )
    return rows


def train_with_torch(model: Any, settings: OptimizerConfig, rows_of_steps: list[Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: transformers' model, torch's AdamW, norms in a group without decay."""
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    results = []
    for rows in rows_of_steps:
        tokens, labels, weights = (
            torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("tokens", "labels", "loss_weights")
        )
        logits = model(tokens).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        results.append((float(loss.detach()), float(norm)))
    return results


def test_thirty_steps_give_the_weights_of_transformers_and_torch(pool: Any) -> None:
    """One step cannot show a wrong decay: it moves a weight by rate * decay, thirty by thirty times that."""
    shape = config_of(hidden=32, heads=4, groups=2, head_dim=16)
    rng = np.random.default_rng(5)
    rows_of_steps = [random_rows(4, rng) for _ in range(30)]
    model = transformers_model(shape).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # An epsilon well above the rounding of gradients: a weight whose gradient is only rounding must not move by it.
    config = with_optimizer(train_config(tensor=2, data=2), epsilon=1e-5, gradient_clip=1.0)
    config = replace(config, model=shape, stage=replace(config.stage, global_batch_size=4, micro_batch_size=1))

    expected_results = train_with_torch(model, config.stage.optimizer, rows_of_steps)
    results, weights = pool.run(train_from, config, our_tensors(start, shape), rows_of_steps)[0]
    for result, (loss, norm) in zip(results, expected_results, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.gradient_norm == pytest.approx(norm, rel=1e-3)
    assert results[-1].loss < 0.8 * results[0].loss, "the model learns, so the weights mean something"
    expected = our_tensors(model.state_dict(), shape)
    assert weights.keys() == expected.keys()
    for name in expected:
        found, want = weights[name], expected[name]
        if found.shape[0] == NUM_IDS + 1:
            found, want = found[:NUM_IDS], want[:NUM_IDS]
        torch.testing.assert_close(found, want, rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}")
