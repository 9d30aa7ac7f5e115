"""Process groups: who talks to whom. Thin over megatron-core's `parallel_state`."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from model.errors import UserError
from model.parallel import cpu_backend

# Of a layout's groups, each with a listening socket, a queue of events, a pipe, and a connection to each other member.
_GROUPS, _FILES_A_GROUP, _LARGE_GROUP = 16, 4, 8
RENDEZVOUS_VARIABLE = "NEXTSTATE_RENDEZVOUS_FILE"  # set by the launcher of local ranks; torchrun has its own
_WHEN_DESTROYED: list[Callable[[], None]] = []


def backend_name() -> str:
    """Tensors of the host go over gloo everywhere, so that an agreement of ranks never waits for a device."""
    return "cpu:gloo,cuda:nccl" if cpu_backend.has_accelerator() else "gloo"


class ReplicaRanks:
    """This process among those of torch's process group, each a whole replica; see `training.contracts.batches.Ranks`."""

    def __init__(self) -> None:
        import torch.distributed as distributed

        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = self.rank, self.world_size

    def any_rank(self, flag: bool) -> bool:
        import torch
        import torch.distributed as distributed

        value = torch.tensor([int(flag)])
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return bool(value.item())

    def sum(self, values: np.ndarray) -> np.ndarray:
        import torch
        import torch.distributed as distributed

        total = torch.from_numpy(np.array(values, np.float64))
        distributed.all_reduce(total)
        return total.numpy()

    def barrier(self) -> None:
        import torch.distributed as distributed

        distributed.barrier()

    @property
    def is_first_of_replica(self) -> bool:
        return True

    def gather(self, payload: bytes) -> list[bytes]:
        import torch
        import torch.distributed as distributed

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        distributed.all_gather(sizes, torch.tensor([len(payload)]))
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
        everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        distributed.all_gather(everyone, mine)
        return [one[: int(size)].numpy().tobytes() for one, size in zip(everyone, sizes, strict=True)]


class MegatronRanks(ReplicaRanks):
    """This process among the ranks of the layout that is initialised."""

    def __init__(self) -> None:
        from model.parallel.megatron import parallel_state

        super().__init__()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()

    @property
    def is_first_of_replica(self) -> bool:
        from model.parallel.megatron import parallel_state

        places = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
        return places == (0, 0, 0)


def launched_init_method() -> str | None:
    """Where ranks that the launcher of this machine started meet; None: the environment says it, or there is one rank."""
    rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
    return f"file://{rendezvous}" if rendezvous else None


def check_number_of(ranks: ReplicaRanks, expected: int) -> None:
    """Raises `UserError` where there are more or fewer processes than the layout has ranks."""
    if ranks.world_size != expected:
        raise UserError(
            "the number of processes is not that of the layout",
            expected=str(expected),
            got=str(ranks.world_size),
            fix="start tensor * pipeline * context * data processes",
        )


def initialize(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    init_method: str | None = None,
    timeout_seconds: float = 1800.0,
) -> None:
    """Join the ranks and lay them out as tensor x context x data x pipeline (tensor varies fastest).

    `rank` and `world_size` default to the launcher's environment, a single process otherwise. `init_method` is
    torch's ("file:///path", for ranks of one machine, or "env://"); a single process needs none. A torch process group
    that is already there is used as it is. Raises `UserError` when the layout does not divide the number of ranks.
    """
    import torch.distributed as distributed

    from model.parallel.megatron import parallel_state

    if not distributed.is_initialized():
        join(rank=rank, world_size=world_size, init_method=init_method, timeout_seconds=timeout_seconds)
    world_size = distributed.get_world_size()
    model_ranks = tensor * pipeline * context
    if world_size % model_ranks:
        raise UserError(
            "the layout does not fit the number of processes",
            expected=f"a multiple of tensor * pipeline * context = {model_ranks}",
            got=str(world_size),
            fix=f"start {model_ranks * max(1, world_size // model_ranks)} processes or change parallel.*",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        distributed_timeout_minutes=max(1, int(timeout_seconds / 60)),
        create_gloo_process_groups=False,
    )


def join(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    init_method: str | None = None,
    timeout_seconds: float = 1800.0,
) -> None:
    """Make torch's process group of all ranks; the arguments are those of `initialize`.

    Ranks of one machine (one process, a rendezvous over a file, a launcher that says so) listen on the loopback
    interface only.
    """
    import torch.distributed as distributed

    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    take_accelerator()
    make_room_for_connections(world_size)
    timeout = timedelta(seconds=timeout_seconds)
    is_alone, store = init_method is None and world_size == 1, None
    meets_by_environment = not is_alone and init_method in (None, "env://") and on_one_machine(world_size)
    if is_alone or meets_by_environment or (init_method or "").startswith("file://"):
        keep_to_loopback()
    if is_alone:
        store = distributed.HashStore()
    elif meets_by_environment and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's own
        store = loopback_store(rank, world_size, timeout)
    distributed.init_process_group(
        backend_name(),
        init_method=None if store else init_method or "env://",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def take_accelerator() -> None:
    """Make the accelerator of this rank torch's current one: each rank of a node has one of its own."""
    if cpu_backend.has_accelerator():
        import torch

        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def make_room_for_connections(world_size: int) -> None:
    """Raise the limit on open files as far as this user may; `UserError` where even that is too low.

    It is asked before: gloo, which finds out in a thread of its own, ends the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_open = len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
    needed = num_open + _GROUPS * (_FILES_A_GROUP + min(world_size, _LARGE_GROUP) - 1) + world_size
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            "too few files may be open for the connections between the ranks",
            expected=f"at least {needed:,}",
            got=f"ulimit -n: {soft:,}, at most {hard:,}",
            fix="ulimit -n 65536 before the command, or LimitNOFILE= of the service that starts it",
        )


def on_one_machine(world_size: int) -> bool:
    """What the launcher says: all ranks are local ones (torchrun, srun on one node), or they meet on loopback."""
    address = os.environ.get("MASTER_ADDR", "")
    is_local = address in ("localhost", "::1") or address.startswith("127.")
    return is_local or os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)


def loopback_store(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store where ranks of one machine meet: torch's own listens on every interface. Port: `MASTER_PORT`."""
    import torch.distributed as distributed

    host, port = "127.0.0.1", int(os.environ["MASTER_PORT"])
    if rank != 0:
        return distributed.TCPStore(host, port, world_size, False, timeout)
    listener = socket.create_server((host, port))
    return distributed.TCPStore(host, port, world_size, True, timeout, master_listen_fd=listener.detach())


def keep_to_loopback() -> None:
    """Tell gloo and NCCL to listen on loopback; left alone, gloo takes the address that the host's name resolves to.

    Sets variables of the environment, which are read whenever a group is made; those of the user stay.
    """
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == "127.0.0.1" for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def is_initialized() -> bool:
    from model.parallel.megatron import parallel_state

    result: bool = parallel_state.model_parallel_is_initialized()
    return result


def when_destroyed(call: Callable[[], None]) -> None:
    """Have `call` made by the next `destroy`, once: for what another library keeps of this layout."""
    _WHEN_DESTROYED.append(call)


def destroy() -> None:
    """Forget the layout and leave the process group. Does nothing where there is none.

    Models and optimizers are cycles of references that hold groups, and a gloo group has threads and sockets: they are
    collected here, or a process that makes one layout after the other has hundreds of threads.
    """
    from model.parallel.megatron import parallel_state

    while _WHEN_DESTROYED:
        _WHEN_DESTROYED.pop()()
    parallel_state.destroy_model_parallel()
    leave()


def leave() -> None:
    """Leave the process group, where there is one and no layout on it."""
    import gc

    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


def seed_random_streams(seed: int) -> None:
    """Seed dropout: one stream per tensor-parallel rank inside split regions, one shared by them outside."""
    import torch

    from model.parallel.megatron import model_parallel_cuda_manual_seed, parallel_state

    # Stages and replicas draw different masks; tensor-parallel ranks must agree outside their split regions.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    stream_seed = seed + 100 * stage + 10_000 * replica
    torch.manual_seed(stream_seed)
    model_parallel_cuda_manual_seed(stream_seed)
