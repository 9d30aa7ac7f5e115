"""What the doctor says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Finding:
    """One thing looked at. `required` things that fail make the doctor exit with 2."""

    name: str
    ok: bool
    detail: str  # version, size, or what went wrong
    cure: str = ""  # what to do when it is not ok
    required: bool = False


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
