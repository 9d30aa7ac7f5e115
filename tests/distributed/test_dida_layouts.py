"""Parallel image decoding learns the same in every layout."""

from __future__ import annotations

from typing import Any

import pytest
from image_rows import ROW_TOKENS, dida_config, train_copies_alone, train_diagonal, train_dida

from model.config import AdapterConfig

LAYOUTS = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "context": {"context": 2}}
ADAPTER = AdapterConfig(rank=2, tokens="copies")


@pytest.fixture(scope="module")
def reference(pool: Any) -> list[tuple[float, float, float]]:
    (found,) = pool.run(train_dida, dida_config(), 4, ranks=1)
    assert found[0][1] > 2.0, "18 codes, untrained"
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_of_copies_do_not_depend_on_the_layout(
    pool: Any, reference: list[tuple[float, float, float]], layout: dict[str, Any]
) -> None:
    for found in pool.run(train_dida, dida_config(**layout), 4, ranks=2):
        for values, expected in zip(found, reference, strict=True):
            assert values[:2] == pytest.approx(expected[:2], rel=1e-5)
            assert values[2] == pytest.approx(expected[2], rel=1e-4)


def test_adapters_on_copies_do_not_depend_on_the_layout(pool: Any) -> None:
    """Sequence parallelism splits what some of them act on; a recomputed layer must choose the same tokens again."""
    (expected,) = pool.run(train_dida, dida_config(ADAPTER), 4, ranks=1)
    for found in pool.run(train_dida, dida_config(ADAPTER, tensor=2, recompute="full"), 4, ranks=2):
        for values, theirs in zip(found, expected, strict=True):
            assert values[:2] == pytest.approx(theirs[:2], rel=1e-5)
            assert values[2] == pytest.approx(theirs[2], rel=1e-4)
    assert expected[3][1] < expected[0][1], "copies are learnt"


def test_rows_without_what_no_copy_sees_teach_the_same_in_every_layout(pool: Any) -> None:
    (expected,) = pool.run(train_copies_alone, dida_config(ADAPTER), 2, 0, ranks=1)
    layouts = ({}, {"tensor": 2, "sequence": False}, *LAYOUTS.values())
    for layout in layouts:
        config = dida_config(ADAPTER, **layout)
        for found in pool.run(train_copies_alone, config, 2, ROW_TOKENS, ranks=2 if layout else 1):
            for values, theirs in zip(found, expected, strict=True):
                assert values[:2] == pytest.approx(theirs[:2], rel=1e-5)
                assert values[2] == pytest.approx(theirs[2], rel=1e-4)


def test_images_read_by_diagonals_do_not_depend_on_the_layout(pool: Any) -> None:
    """Context parallelism cuts the steps of copies: what both ranks hold of one is attended to by both."""
    (expected,) = pool.run(train_diagonal, dida_config(), 2, ranks=1)
    for layout in (LAYOUTS["tensor"], LAYOUTS["context"]):
        for found in pool.run(train_diagonal, dida_config(**layout), 2, ranks=2):
            for values, theirs in zip(found, expected, strict=True):
                assert values[:2] == pytest.approx(theirs[:2], rel=1e-5)
                assert values[2] == pytest.approx(theirs[2], rel=1e-4)
