"""What the workers run: every part of a layout built, and one step of it traced, in one process with faked peers."""

from __future__ import annotations

from typing import Any


def try_layouts(cases: list[tuple[Any, Any, Any]]) -> list[str]:
    """For each (ModelConfig, plan's Layout, plan's Batch) the error that building it ends with; empty where it runs."""
    from launch.plan.simulate import simulate
    from model.parallel import groups

    groups.destroy()  # the pool's own process group: each part makes a fake one of the layout's size
    return [error_of(simulate, *case) for case in cases]


def error_of(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
