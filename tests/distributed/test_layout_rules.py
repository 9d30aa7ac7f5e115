"""What `training/contracts/layout.py` calls possible is possible: megatron-core builds it and runs a step."""

from __future__ import annotations

import random
from typing import Any

import pytest
from layout_rules_runs import try_layouts

from launch.plan.layout import Batch, Layout
from model.config import ModelConfig
from model.parallel.layout_rules import divided_sizes
from model.vocabulary import VocabularyConfig
from training.contracts.layout import ENGINE_RULES, ParallelLayout, Rows

NUM_ACCEPTED = 12


def tiny(heads: int = 4, groups: int = 2, ffn: int = 48, layers: int = 2, padding: int = 32) -> ModelConfig:
    vocabulary = VocabularyConfig(text_size=90, reserved_size=16, visual_size=60, pad_multiple=padding)
    return ModelConfig("tiny", layers, 16, ffn, heads, groups, 8, vocabulary=vocabulary)


def random_case(draw: random.Random) -> tuple[ModelConfig, Layout, Batch]:
    """At most 4 ranks, and sizes of which many do not divide among them."""
    groups = draw.choice([1, 2, 3, 4])
    model = tiny(groups * draw.choice([1, 2, 3]), groups, draw.choice([24, 30, 36, 64]), draw.choice([1, 2, 3, 4]))
    ranks = draw.choice(
        [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (4, 1, 1, 1)]
        + [(2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2), (2, 1, 1, 2), (1, 1, 4, 1)]
        + [(3, 1, 1, 1), (1, 3, 1, 1), (1, 1, 3, 1), (1, 1, 1, 3), (1, 4, 1, 1)]
    )
    layout = Layout(*ranks, micro_batch=draw.choice([1, 2, 3]), sequence_parallel=draw.random() < 0.7)
    rows = layout.micro_batch * layout.data * draw.choice([1, 2])
    return model, layout, Batch(draw.choice([12, 16, 18, 20, 24, 30]), rows, 4.0)


def found(case: tuple[ModelConfig, Layout, Batch]) -> list[Any]:
    model, layout, batch = case
    rows = Rows(batch.sequence_length, layout.micro_batch, batch.global_batch_size)
    return ParallelLayout.of(layout).problems(divided_sizes(model), rows)


def test_what_is_accepted_runs(pool: Any) -> None:
    draw = random.Random(20261126)
    cases = [random_case(draw) for _ in range(400)]
    accepted = [case for case in cases if not found(case)]
    several = [case for case in accepted if case[1].world_size > 1][:NUM_ACCEPTED]
    assert len(several) == NUM_ACCEPTED
    assert {case[1].context for case in several} >= {1, 2}
    assert len(accepted) < 0.6 * len(cases), "many are refused, so accepting everything would be seen"
    (errors,) = pool.run(try_layouts, several, ranks=1)
    assert not [(case, error) for case, error in zip(several, errors, strict=True) if error]


IMPOSSIBLE = {
    "heads": (tiny(6, 3), Layout(tensor=2), Batch(16, 2, 4.0)),
    "ffn": (tiny(ffn=45), Layout(tensor=2), Batch(16, 2, 4.0)),
    "vocabulary": (tiny(padding=169), Layout(tensor=2), Batch(16, 2, 4.0)),
    "layers": (tiny(layers=3), Layout(pipeline=2), Batch(16, 2, 4.0)),
    "chunks": (tiny(), Layout(context=2), Batch(18, 2, 4.0)),
}


def test_what_is_refused_does_not_run(pool: Any) -> None:
    """Each rule is there because megatron-core, or our attention, needs it."""
    assert all(found(case) for case in IMPOSSIBLE.values())
    (errors,) = pool.run(try_layouts, list(IMPOSSIBLE.values()), ranks=1)
    assert [name for name, error in zip(IMPOSSIBLE, errors, strict=True) if not error] == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_each_problem_is_told_alone(name: str) -> None:
    (problem,) = found(IMPOSSIBLE[name])
    assert problem.message
    assert problem.fix


def test_the_fixes_are_valid() -> None:
    """What a message offers is accepted when it is taken."""
    model, layout, batch = IMPOSSIBLE["chunks"]
    (problem,) = found((model, layout, batch))
    key, value = problem.fix.split("=")
    assert key == "stage.sequence_length"
    assert not found((model, layout, Batch(int(value), batch.global_batch_size, 4.0)))


def test_an_engine_of_the_users_own_has_no_rules_beyond_the_models() -> None:
    assert set(ENGINE_RULES) == {"megatron", "deepspeed", "replicated"}
    layout, sizes, rows = ParallelLayout(tensor=2, context=2), divided_sizes(tiny()), Rows(17, 1, 1)
    assert layout.problems(sizes, rows)
    assert not layout.problems(sizes, rows, engine="mine.Engine")
    assert ParallelLayout(tensor=3).problems(sizes, rows, engine="mine.Engine")
