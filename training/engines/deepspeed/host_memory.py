"""Offload with too little host memory is refused before anything is allocated."""

from __future__ import annotations

import socket

import psutil
import torch.distributed as distributed

from model.config import count_parameters, count_trained_parameters
from model.errors import UserError
from training.config import TrainConfig
from training.contracts.zero import host_bytes


def ranks_of_this_host() -> int:
    """Every rank calls it."""
    names: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def check_host_memory(config: TrainConfig, ranks_here: int) -> None:
    """Raises `UserError` when the offloaded state of `ranks_here` ranks is more than their host has."""
    parameters, trained = count_parameters(config.model)["total"], count_trained_parameters(config.model)
    dtype_bytes = 4 if config.model.dtype == "float32" else 2
    everywhere = host_bytes(config.deepspeed, parameters, trained, dtype_bytes)
    needed = everywhere * ranks_here / config.parallel.world_size
    available = psutil.virtual_memory().total
    if needed <= available:
        return
    raise UserError(
        "the state that is to be offloaded is more than this host's memory",
        where="deepspeed.offload_optimizer",
        expected=f"at most {available / 1e9:.1f} GB",
        got=f"{needed / 1e9:.1f} GB of {ranks_here} ranks",
        fix="more hosts (parallel.data), or deepspeed.offload_optimizer=none",
    )
