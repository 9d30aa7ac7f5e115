"""Low-rank adapters in every layout: the same training, and not a bit of the model's own weights changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layout_runs import continue_from, save_after, train_config, train_whole

from model.config import count_adapter_parameters

LAYOUTS = {
    "tensor": {"tensor": 2},
    "tensor_without_sequence": {"tensor": 2, "sequence": False},
    "tensor_recompute_full": {"tensor": 2, "recompute": "full"},
    "pipeline": {"pipeline": 2},
    "data": {"data": 2},
}
NUM_STEPS = 6


@pytest.fixture(scope="module")
def reference(pool: Any) -> Any:
    """One process."""
    (found,) = pool.run(train_whole, train_config(adapter_rank=4), NUM_STEPS, ranks=1)
    assert found[0][-1].loss < found[0][0].loss, "the adapters learn"
    return found


def check_weights(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    own = [key for key in before if key.startswith("model/") and ".lora." not in key]
    assert len(own) == 3 + 4 * 8
    assert all(torch.equal(before[key], after[key]) for key in own)
    adapters = [key for key in before if key.startswith("model/") and ".lora." in key]
    assert len(adapters) == 4 * 4 * 2  # in each of four layers two matrices for each of four linear layers
    assert sum(before[key].numel() for key in adapters) == count_adapter_parameters(train_config(adapter_rank=4).model)
    assert not any(torch.equal(before[key], after[key]) for key in adapters)
    moments = {key for key in after if key.startswith("optimizer/exp_avg/")}
    assert moments == {f"optimizer/exp_avg/{key.removeprefix('model/')}" for key in adapters}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_adapters_train_alike_in_every_layout(pool: Any, reference: Any, layout: dict[str, Any]) -> None:
    expected, start, end = reference
    check_weights(start, end)
    found, before, after = pool.run(train_whole, train_config(adapter_rank=4, **layout), NUM_STEPS, ranks=2)[0]
    check_weights(before, after)
    assert all(torch.equal(before[key], start[key]) for key in start if key.startswith("model/"))
    for result, want in zip(found, expected, strict=True):
        assert result.loss == pytest.approx(want.loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-4)
    for key in end:
        if ".lora." in key and key.startswith("model/"):
            # Where a gradient is all but zero Adam makes a step of its rounding: whole tensors are compared.
            moved = torch.linalg.vector_norm(end[key] - start[key])
            assert torch.linalg.vector_norm(after[key] - end[key]) <= 5e-3 * moved, key


def test_a_stage_with_adapters_begins_from_a_checkpoint_without(pool: Any) -> None:
    (reader, _, _) = pool.run(save_after, train_config(), 1, ranks=1)[0]
    reader.tensors = {key: value for key, value in reader.tensors.items() if key.startswith("model/")}
    (found,) = pool.run(adapted_loss, train_config(adapter_rank=4), reader, ranks=1)
    (plain,) = pool.run(adapted_loss, train_config(), reader, ranks=1)
    assert found == pytest.approx(plain, rel=1e-6), "fresh adapters add nothing"
    (wanted,) = pool.run(reference_log_probs, train_config(), reader, ranks=1)
    for engine in ("megatron", "deepspeed"):
        config = replace(train_config(adapter_rank=4), engine=engine)
        (reference,) = pool.run(reference_log_probs, config, reader, ranks=1)
        for values, want in zip(reference, wanted, strict=True):
            torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5, msg=f"{engine}: not that checkpoint")


def reference_log_probs(config: Any, reader: Any) -> list[torch.Tensor]:
    """By the weights of a checkpoint in place of those that a step has moved, adapters included."""
    from layout_runs import Trainer

    trainer = Trainer(config)
    trainer.shards.load_model(reader)
    trainer.steps(0, 2)
    with trainer.engine.weights_of(reader):
        found: list[torch.Tensor] = trainer.engine.log_probs(trainer.batches(5), trainer.objective)
    return found


def adapted_loss(config: Any, reader: Any) -> float:
    from layout_runs import Trainer

    trainer = Trainer(config)
    trainer.shards.load_model(reader)
    return trainer.forward_backward(5).loss


def test_adapters_move_between_layouts(pool: Any) -> None:
    reader, expected, _ = pool.run(save_after, train_config(adapter_rank=4, tensor=2), 2, ranks=2)[0]
    found, _ = pool.run(continue_from, train_config(adapter_rank=4, data=2), reader, 2, ranks=2)[0]
    for result, want in zip(found, expected, strict=True):
        assert result.loss == pytest.approx(want.loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-4)
