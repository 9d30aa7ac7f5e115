"""The pool itself: fresh groups, results by rank, failures with their traceback; and a rank that may open too few files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import process_pool
import pytest


def sum_of_ranks() -> tuple[int, int, int]:
    import torch
    import torch.distributed as distributed

    total = torch.tensor([distributed.get_rank()])
    distributed.all_reduce(total)
    return distributed.get_rank(), int(total), os.getpid()


def threads_before_a_layout_in_a_circle() -> int:
    """Models hold their groups in circles of references; here the smallest one."""
    from model.parallel import groups
    from model.parallel.megatron import parallel_state

    before = len(list(Path("/proc/self/task").iterdir()))
    groups.initialize(tensor=2)
    circle: dict[str, Any] = {"group": parallel_state.get_tensor_model_parallel_group()}
    circle["itself"] = circle
    return before


def fail_on(rank: int) -> None:
    import torch.distributed as distributed

    if distributed.get_rank() == rank:
        raise ValueError("on purpose")


def fail_while_another_waits(rank: int) -> None:
    """As a model does, the frame of the error holds a group, in a circle of references."""
    import torch
    import torch.distributed as distributed

    from model.parallel import groups
    from model.parallel.megatron import parallel_state

    groups.initialize(tensor=2)
    circle: dict[str, Any] = {"group": parallel_state.get_tensor_model_parallel_group()}
    circle["itself"] = circle
    if distributed.get_rank() == rank:
        raise ValueError("on purpose")
    distributed.all_reduce(torch.zeros(1), group=circle["group"])


def wait_for_nobody() -> None:
    import threading

    import torch.distributed as distributed

    if distributed.get_rank() == 1:
        threading.Event().wait()


def die(rank: int) -> None:
    import torch.distributed as distributed

    if distributed.get_rank() == rank:
        os._exit(1)
    distributed.barrier()


def test_workers_persist_and_groups_are_fresh(pool: Any) -> None:
    two = pool.run(sum_of_ranks, ranks=2)
    three = pool.run(sum_of_ranks, ranks=3)
    assert [answer[:2] for answer in two] == [(0, 1), (1, 1)]
    assert [answer[:2] for answer in three] == [(0, 3), (1, 3), (2, 3)]
    assert [answer[2] for answer in two] == [answer[2] for answer in three[:2]]


def test_no_threads_stay_behind(pool: Any) -> None:
    _, *counts = (
        pool.run(threads_before_a_layout_in_a_circle, ranks=2) for _ in range(4)
    )  # the first starts torch's own
    assert counts[0] == counts[1] == counts[2]


def test_a_failure_names_the_rank_and_the_pool_goes_on(pool: Any) -> None:
    with pytest.raises(AssertionError, match=r"rank 1:\n[\s\S]*on purpose"):
        pool.run(fail_on, 1, ranks=2)
    assert pool.run(sum_of_ranks, ranks=2)[0][1] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_failed_hears_of_it(pool: Any, rank: int) -> None:
    pids = [one[2] for one in pool.run(sum_of_ranks, ranks=2)]
    with pytest.raises(AssertionError, match=rf"rank {rank}:\n[\s\S]*on purpose") as caught:
        pool.run(fail_while_another_waits, rank, ranks=2)
    assert f"rank {1 - rank}:\nTraceback" in str(caught.value)  # its collective ended: the connection was closed
    assert [one[2] for one in pool.run(sum_of_ranks, ranks=2)] == pids


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = process_pool.ProcessPool(tmp_path)
    pids = [one[2] for one in pool.run(sum_of_ranks, ranks=2)]
    monkeypatch.setattr(process_pool, "JOB_TIMEOUT_SECONDS", 20)
    with pytest.raises(AssertionError) as caught:
        pool.run(wait_for_nobody, ranks=2)
    monkeypatch.undo()
    assert re.search(r"rank 1:\nno answer within 20 s\n[\s\S]*in wait_for_nobody", str(caught.value))
    assert not {one[2] for one in pool.run(sum_of_ranks, ranks=2)} & set(pids)
    pool.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named(pool: Any, rank: int) -> None:
    with pytest.raises(AssertionError, match=rf"rank {rank}:\nthe process died"):
        pool.run(die, rank, ranks=2)
    assert [one[1] for one in pool.run(sum_of_ranks, ranks=2)] == [1, 1]


def connect_with_few_files() -> str:
    """gloo ends a process that may open no more files; the message for a limit that nothing can raise is returned."""
    import resource

    import torch
    import torch.distributed as distributed

    from model.errors import UserError
    from model.parallel import groups

    os.close(free := os.dup(0))  # the lowest number that is free
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        groups.make_room_for_connections(2)
        distributed.all_reduce(torch.zeros(1), group=distributed.new_group([0, 1]))
        groups.make_room_for_connections(10**12)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return ""


def test_room_is_made_for_gloos_connections_or_its_lack_told(pool: Any) -> None:
    for told in pool.run(connect_with_few_files, ranks=2):
        assert "too few files may be open" in told
        assert "ulimit -n" in told
