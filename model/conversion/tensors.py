"""What conversion sees of a tensor: a name, a shape, a dtype, and rows of bytes. Nothing here imports torch.

A tensor is read and written as a matrix of bytes [rows, row_bytes], its first dimension the rows (a scalar is one
row). Every map between layouts permutes whole rows, so a conversion copies bytes and never rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (by torch's name, `bfloat16`) of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.row_elements * ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class TensorSource(Protocol):
    """Named tensors that can be read by rows, from any thread."""

    place: str  # for messages: a folder, a file, or how the values are made
    tensors: dict[str, TensorInfo]

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> int | None:
        """Fill `out`, uint8 [stop - start, row_bytes], with rows [start, stop); their crc32 where it is known."""
        ...

    def rows_at_once(self, name: str) -> int | None:
        """Reading in blocks of this many rows is cheapest; None: any number is."""
        ...

    def identity(self) -> Any:
        """JSON that differs when the values may differ: a resumed conversion compares it."""
        ...

    def verify(self) -> None:
        """Compare what was read with its recorded checksums, if there are any. Raises `UserError`."""
        ...

    def close(self) -> None: ...


def cast_rows(rows: np.ndarray, source: str, target: str) -> np.ndarray:
    """Rows of bytes from one float dtype to another, rounded to nearest even. uint8 in, uint8 out."""
    if source == target:
        return rows
    values = _to_float32(rows, source)
    return _from_float32(values, target)


CASTABLE = ("float32", "bfloat16", "float16", "float64")


def _to_float32(rows: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.view(np.dtype(dtype)).astype(np.float32)


def _from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(np.dtype(dtype)).view(np.uint8)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)  # rounding could carry a NaN to infinity
    return np.where(np.isnan(values), quiet_nan, rounded).view(np.uint8)


# Exponents of all ones: infinities and NaN.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}


def is_finite(rows: np.ndarray, dtype: str) -> bool:
    """Whether rows of bytes of a float dtype hold neither infinities nor NaN. Other dtypes always do."""
    if dtype not in _EXPONENTS or not rows.size:
        return True
    words, mask = _EXPONENTS[dtype]
    return int((rows.view(words) & words(mask)).max()) != mask
