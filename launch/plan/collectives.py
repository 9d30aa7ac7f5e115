"""Collectives that are written down instead of carried out, so that one process can stand for any rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Of each call: the argument whose size is that of the whole message, by name and place.
_MESSAGES = {
    "all_reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "isend": ("tensor", 0),
    "irecv": ("tensor", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "_all_gather_base": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input", 1),
    "_reduce_scatter_base": ("input", 1),
}
_TITLES = {
    "all_gather_into_tensor": "all_gather",
    "_all_gather_base": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "isend": "send",
    "irecv": "receive",
}


@dataclass
class Recorder:
    """Calls by (group, operation): how many, and bytes of their messages."""

    group_names: dict[int, str]  # id of a process group -> name
    calls: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def record(self, operation: str, group: Any, message: torch.Tensor) -> None:
        name = "world" if group is None else self.group_names.get(id(group), "other")
        entry = self.calls.setdefault((name, _TITLES.get(operation, operation)), [0, 0])
        entry[0] += 1
        entry[1] += message.numel() * message.element_size()


def by_group(calls: dict[tuple[str, str], list[int]]) -> dict[str, dict[str, dict[str, int]]]:
    """{group: {operation: {count, bytes}}}"""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (group, operation), (count, size) in sorted(calls.items()):
        found.setdefault(group, {})[operation] = {"count": count, "bytes": size}
    return found


class _Done:
    """The handle of a call that is over."""

    def wait(self) -> None:
        return None

    def is_completed(self) -> bool:
        return True


def _stand_in(recorder: Recorder, operation: str) -> Callable[..., _Done]:
    name, place = _MESSAGES[operation]

    def call(*arguments: Any, group: Any = None, **options: Any) -> _Done:
        message = options[name] if name in options else arguments[place]
        if group is None and operation in ("all_reduce", "broadcast") and len(arguments) > 2:
            group = arguments[2]
        recorder.record(operation, group, message)
        return _Done()

    return call


@contextmanager
def recorded(group_names: dict[int, str]) -> Iterator[Recorder]:
    """Every collective of torch and megatron-core in this block is recorded and does nothing.

    Buffers that megatron-core allocates for them are on the meta device.
    """
    import torch.distributed as distributed

    recorder = Recorder(group_names)
    stand_ins = {
        getattr(distributed, name): _stand_in(recorder, name) for name in _MESSAGES if hasattr(distributed, name)
    }
    # A device context does not reach into the backward pass: it is off while the pass runs.
    replaced: list[tuple[Any, str, Any]] = [(torch, "get_default_device", torch.get_default_device)]
    meta = torch.device("meta")
    torch.get_default_device = lambda: meta
    names = [name for name in sys.modules if name.startswith("megatron.core.")]
    for module in [distributed, *(sys.modules[name] for name in names)]:
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in stand_ins:
                replaced.append((module, attribute, value))
                setattr(module, attribute, stand_ins[value])
    try:
        yield recorder
    finally:
        for module, attribute, value in replaced:
            setattr(module, attribute, value)
