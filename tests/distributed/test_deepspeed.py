"""A second opinion: DeepSpeed's optimizers and reductions against megatron-core's, checkpoints from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import (
    ask,
    go_on,
    megatron_config,
    refuse_each,
    resume_each,
    save_and_go_on,
    threads_before_a_layout,
    train_each,
    zero_config,
)
from torch.utils.cpp_extension import get_default_build_root

from training.engines.deepspeed.library import load_compiled_adam

NUM_STEPS = 20
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def reference(pool: Any) -> Any:
    """megatron-core's distributed optimizer on two replicas: (results, whole state)."""
    ((results, tensors, _),) = pool.run(train_each, [megatron_config(data=2)], NUM_STEPS, ranks=2)[0]
    assert results[-1].loss < 0.8 * results[0].loss, "the model learns, so the curves mean something"
    assert any(result.gradient_norm > 0.5 for result in results), "clipping is at work"
    return results, tensors


def assert_same_curve(results: list[Any], expected: list[Any], *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    assert len(results) == len(expected)
    for result, want in zip(results, expected, strict=True):
        assert result.loss == pytest.approx(want.loss, rel=loss)
        assert result.gradient_norm == pytest.approx(want.gradient_norm, rel=norm)
        assert result.num_tokens == want.num_tokens


@pytest.mark.parametrize(
    ("stages", "layout"),
    [(STAGES, {"data": 2}), (STAGES, {"tensor": 2, "data": 2}), ((1,), {"tensor": 2, "sequence": False})],
    ids=["data", "tensor_data", "tensor_without_sequence"],
)
def test_the_engines_agree(pool: Any, reference: Any, stages: tuple[int, ...], layout: dict[str, Any]) -> None:
    """Twenty steps, other numbers of learnt tokens on each rank, clipping; tensor ranks' copies never drift apart."""
    configs = [zero_config(stage, **layout) for stage in stages]
    by_rank = pool.run(train_each, configs, NUM_STEPS, ranks=configs[0].parallel.world_size)
    for results, tensors, copies in by_rank[0]:
        assert_same_curve(results, reference[0])
        assert tensors.keys() == reference[1].keys()
        for key, want in reference[1].items():
            torch.testing.assert_close(
                tensors[key], want, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
        assert copies == 0.0
    assert all([run[0] for run in runs] == [run[0] for run in by_rank[0]] for runs in by_rank)


def test_offload_changes_nothing(pool: Any, reference: Any) -> None:
    configs = [zero_config(stage, offload="cpu", data=2) for stage in STAGES]
    configs.append(zero_config(3, offload="cpu", weights="cpu", data=2))
    for results, _, _ in pool.run(train_each, configs, 6, ranks=2)[0]:
        assert_same_curve(results, reference[0][:6])


@pytest.mark.compiler
def test_the_compiled_adam_gives_the_same_curve(pool: Any, reference: Any) -> None:
    """Compiled here, unless torch has kept it of an earlier run; and a run goes on from the one to the other."""
    load_compiled_adam()  # here, where nobody waits for an answer in time
    (built,) = Path(get_default_build_root()).glob("**/cpu_adam/cpu_adam.so")
    (built.parent / "lock").touch()  # as a process leaves it that is killed while it compiles
    compiled = zero_config(3, offload="cpu", compiled_adam=True, data=2)
    ((results, _, _),) = pool.run(train_each, [compiled], 6, ranks=2)[0]
    assert_same_curve(results, reference[0][:6])
    reader, later, _ = pool.run(save_and_go_on, zero_config(3, offload="cpu", data=2), 3, ranks=2)[0]
    found, _, _ = pool.run(go_on, compiled, reader, 3, ranks=2)[0]
    assert_same_curve(found, later)


def test_whole_layers_computed_again_and_rows_cut_over_ranks(pool: Any, reference: Any) -> None:
    """Recomputation inside of stage 3's gathering, and context parallelism beside it."""
    again = [zero_config(3, recompute=choice, data=2) for choice in ("full", "selective")]
    runs = pool.run(train_each, again, 4, ranks=2)[0]
    runs += pool.run(train_each, [zero_config(stage, context=2) for stage in (1, 3)], 4, ranks=2)[0]
    for results, _, _ in runs:
        assert_same_curve(results, reference[0][:4])


def test_adapters_learn_alike_and_the_rest_stays(pool: Any) -> None:
    """Most parameters have no gradient: neither are they moved, nor is state kept for them."""
    ((results, expected, _),) = pool.run(train_each, [megatron_config(adapter_rank=4, data=2)], 6, ranks=2)[0]
    configs = [zero_config(stage, adapter_rank=4, data=2) for stage in STAGES]
    configs.append(zero_config(3, offload="cpu", weights="cpu", adapter_rank=4, data=2))
    runs = pool.run(train_each, configs, 6, ranks=2)[0]
    runs += pool.run(train_each, [zero_config(stage, adapter_rank=4, tensor=2) for stage in (1, 3)], 6, ranks=2)[0]
    for found, tensors, copies in runs:
        assert_same_curve(found, results)
        assert tensors.keys() == expected.keys()
        assert copies == 0.0
        for key, want in expected.items():
            is_trained = ".lora." in key
            assert is_trained or key == "optimizer/step" or not key.startswith("optimizer/")
            torch.testing.assert_close(tensors[key], want, rtol=0, atol=2e-5 if is_trained else 0)


def test_an_engine_left_behind_takes_its_threads_along(pool: Any) -> None:
    config = zero_config(3, data=2)
    pool.run(threads_before_a_layout, config, ranks=2)  # the first starts torch's own
    counts = [pool.run(threads_before_a_layout, config, ranks=2) for _ in range(3)]
    assert counts[0] == counts[1] == counts[2]


def test_bfloat16_follows(pool: Any) -> None:
    """Losses within 2e-2 of megatron's; the first gradient closer than sums in bfloat16 would bring it."""
    expected = pool.run(train_each, [megatron_config("bfloat16", data=2)], 8, ranks=2)[0][0][0]
    zero = [zero_config(stage, "bfloat16", data=2) for stage in STAGES]
    zero.append(zero_config(3, "bfloat16", data=2, offload="cpu"))
    for results, tensors, _ in pool.run(train_each, zero, 8, ranks=2)[0]:
        assert_same_curve(results, expected, loss=2e-2, norm=5e-2)
        assert results[0].gradient_norm == pytest.approx(expected[0].gradient_norm, rel=5e-4)
        assert any(key.startswith("optimizer/master/") for key in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bitwise_the_same(pool: Any, dtype: str) -> None:
    """With the optimizer's offload also what was gathered stays, as in a model of this size without the test's limits."""
    cases = ((1, "none"), (3, "none"), (3, "cpu"))
    configs = [zero_config(stage, dtype, offload=one, keeps=one == "cpu", data=2) for stage, one in cases]
    for saved, later, end, found, loaded, found_end in pool.run(resume_each, configs, 3, ranks=2)[0]:
        assert loaded.keys() == saved.keys()
        assert saved["optimizer/step"].item() == 3
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)
        assert found == later
        assert all(torch.equal(found_end[key], end[key]) for key in end)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (megatron_config(data=2), zero_config(3, tensor=2)),
        (zero_config(3, data=2), megatron_config(tensor=2)),
        (zero_config(1, tensor=2), zero_config(2, data=2)),
        (megatron_config("bfloat16", data=2), zero_config(3, "bfloat16", data=2)),
        (zero_config(1, "bfloat16", data=2), megatron_config("bfloat16", data=2)),
    ],
    ids=["to_deepspeed", "to_megatron", "between_stages", "to_deepspeed_bfloat16", "to_megatron_bfloat16"],
)
def test_a_run_changes_its_engine(pool: Any, before: Any, after: Any) -> None:
    reader, later, _ = pool.run(save_and_go_on, before, 3, ranks=2)[0]
    found, loaded, _ = pool.run(go_on, after, reader, 3, ranks=2)[0]
    assert loaded.keys() == reader.tensors.keys()
    for key, want in reader.tensors.items():
        assert torch.equal(loaded[key], want), key
    in_bfloat16 = before.model.dtype == "bfloat16"
    assert_same_curve(found, later, loss=2e-3 if in_bfloat16 else 1e-5, norm=2e-2 if in_bfloat16 else 1e-4)


def test_a_refused_step_leaves_no_trace_and_no_number_is_hidden(pool: Any) -> None:
    configs = [zero_config(stage, offload=offload, data=2) for stage in STAGES for offload in ("none", "cpu")]
    configs += [zero_config(1, "bfloat16", data=2)]
    for refused, clean, broken in pool.run(refuse_each, configs, ranks=2)[0]:
        assert refused == clean
        assert not broken < float("inf")


def test_a_policy_and_a_frozen_model_answer_as_megatron_and_hold_their_part(pool: Any) -> None:
    expected = pool.run(ask, megatron_config(data=2), ranks=2)
    for stage in (1, 3):
        for found, want in zip(pool.run(ask, zero_config(stage, data=2), ranks=2), expected, strict=True):
            for kind in ("log_probs", "logits"):
                for values, others in zip(found[kind], want[kind], strict=True):
                    torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-5)
            assert found["step"] == pytest.approx(want["step"], rel=1e-5)
            for values, others in zip(found["start_log_probs"], found["log_probs"], strict=True):
                torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-5)
            assert found["came_back"]
            assert found["resident"] == [found["elements"] // (2 if stage == 3 else 1)] * 3
            assert found["frozen_resident"] == found["elements"] // 2
