"""The central correctness tests: every layout trains the same model, and checkpoints move between layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layout_runs import (
    continue_from,
    discarded_step,
    dropout_replay,
    initial_tensors,
    load_foreign_checkpoint,
    save_after,
    train,
    train_and_validate,
    train_config,
    vote,
)

LAYOUTS = {
    "tensor": {"tensor": 2},
    "tensor_without_sequence": {"tensor": 2, "sequence": False},
    "pipeline": {"pipeline": 2},
    "tensor_recompute_full": {"tensor": 2, "recompute": "full"},
    "pipeline_recompute_selective": {"pipeline": 2, "recompute": "selective"},
    "data": {"data": 2},
    "data_without_distributed_optimizer": {"data": 2, "distributed_optimizer": False},
    "context": {"context": 2},
    "tensor_pipeline": {"tensor": 2, "pipeline": 2},
    "tensor_data": {"tensor": 2, "data": 2},
}
NUM_STEPS = 20


def ranks_of(layout: dict[str, Any]) -> int:
    return train_config(**layout).parallel.world_size


@pytest.fixture(scope="module")
def trained(pool: Any) -> tuple[list[Any], Any]:
    """One process: the steps and the held-out loss after them."""
    ((results, held_out),) = pool.run(train_and_validate, train_config(), NUM_STEPS, ranks=1)
    assert results[-1].loss < 0.5 * results[0].loss, "the model learns, so the curves mean something"
    return results, held_out


@pytest.fixture(scope="module")
def reference(trained: tuple[list[Any], Any]) -> list[Any]:
    return trained[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_do_not_depend_on_the_layout(pool: Any, trained: tuple[list[Any], Any], layout: dict[str, Any]) -> None:
    by_rank = pool.run(train_and_validate, train_config(**layout), NUM_STEPS, ranks=ranks_of(layout))
    assert all(answer == by_rank[0] for answer in by_rank), "the report is the same on every rank"
    (results, held_out), (reference, held_out_alone) = by_rank[0], trained
    for found, expected in zip(held_out, held_out_alone, strict=True):
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5)
    for result, expected in zip(results, reference, strict=True):
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        for name in ("loss_text", "loss_visual", "loss_structure"):
            assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
        assert result.metrics["loss_by_source"] == pytest.approx(expected.metrics["loss_by_source"], rel=1e-4)
        assert result.metrics["tokens_by_class"] == expected.metrics["tokens_by_class"]
        assert result.metrics["tokens_by_source"] == expected.metrics["tokens_by_source"]
        assert result.num_tokens == expected.num_tokens == 512


def test_initial_weights_are_bitwise_the_same_in_every_layout(pool: Any) -> None:
    (expected,) = pool.run(initial_tensors, train_config(), ranks=1)
    layout = LAYOUTS["tensor_pipeline"]
    found = pool.run(initial_tensors, train_config(**layout), ranks=ranks_of(layout))[0]
    assert found.keys() == expected.keys()
    assert len(found) == 3 + 4 * 8  # two embeddings and the final norm; eight parameters in each of four layers
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("written", "read"), [("tensor", "data"), ("data", "pipeline"), ("tensor_data", "tensor_pipeline")]
)
def test_a_checkpoint_moves_between_layouts(pool: Any, written: str, read: str) -> None:
    before, after = LAYOUTS[written], LAYOUTS[read]
    reader, expected, _ = pool.run(save_after, train_config(**before), 4, ranks=ranks_of(before))[0]
    found, _ = pool.run(continue_from, train_config(**after), reader, 4, ranks=ranks_of(after))[0]
    for result, want in zip(found, expected, strict=True):
        assert result.loss == pytest.approx(want.loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_layout_resumes_bitwise(pool: Any, dtype: str) -> None:
    config = train_config(dtype=dtype, **LAYOUTS["data"])
    reader, expected, weights = pool.run(save_after, config, 4, ranks=2)[0]
    assert reader.tensors["optimizer/step"].item() == 4
    found, found_weights = pool.run(continue_from, config, reader, 4, ranks=2)[0]
    assert found == expected
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(found_weights[key], weights[key]) for key in weights)
    assert any(key.startswith("optimizer/master/") for key in weights) == (dtype == "bfloat16")


def test_bfloat16_trains_in_layouts_and_follows_float32(pool: Any, reference: list[Any]) -> None:
    for name in ("data", "tensor_pipeline"):
        layout = LAYOUTS[name]
        results = pool.run(train, train_config(dtype="bfloat16", **layout), 8, ranks=ranks_of(layout))[0]
        for result, expected in zip(results, reference, strict=False):
            assert result.loss == pytest.approx(expected.loss, rel=2e-2)


def test_a_refused_step_leaves_no_trace(pool: Any) -> None:
    for refused, clean in pool.run(discarded_step, train_config(**LAYOUTS["data"]), ranks=2):
        assert refused == clean


def test_random_streams_are_restored(pool: Any) -> None:
    config = train_config(dropout=0.2, **LAYOUTS["tensor"])
    for first, again, other in pool.run(dropout_replay, config, ranks=2):
        assert first == again
        assert first.loss != other.loss


def test_ranks_decide_together(pool: Any) -> None:
    assert pool.run(vote, train_config(**LAYOUTS["data"]), ranks=2) == [(True, False)] * 2


def test_a_checkpoint_of_another_model_is_refused(pool: Any) -> None:
    (message,) = pool.run(load_foreign_checkpoint, train_config(), ranks=1)
    assert "does not fit this model" in message
    assert "model/embedding.word_embeddings.weight" in message
