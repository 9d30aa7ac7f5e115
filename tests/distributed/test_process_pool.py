"""The pool itself: fresh groups, results by rank, failures with their traceback."""

from __future__ import annotations

import os
from typing import Any

import pytest


def sum_of_ranks() -> tuple[int, int, int]:
    import torch
    import torch.distributed as distributed

    total = torch.tensor([distributed.get_rank()])
    distributed.all_reduce(total)
    return distributed.get_rank(), int(total), os.getpid()


def fail_on(rank: int) -> None:
    import torch.distributed as distributed

    if distributed.get_rank() == rank:
        raise ValueError("on purpose")


def test_workers_persist_and_groups_are_fresh(pool: Any) -> None:
    two = pool.run(sum_of_ranks, ranks=2)
    three = pool.run(sum_of_ranks, ranks=3)
    assert [answer[:2] for answer in two] == [(0, 1), (1, 1)]
    assert [answer[:2] for answer in three] == [(0, 3), (1, 3), (2, 3)]
    assert [answer[2] for answer in two] == [answer[2] for answer in three[:2]]


def test_a_failure_names_the_rank_and_the_pool_goes_on(pool: Any) -> None:
    with pytest.raises(AssertionError, match=r"rank 1:\n[\s\S]*on purpose"):
        pool.run(fail_on, 1, ranks=2)
    assert pool.run(sum_of_ranks, ranks=2)[0][1] == 1
