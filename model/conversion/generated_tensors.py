"""Values that no checkpoint holds: fresh weights, rows that pad the vocabulary, norms of one, new vocabulary rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.config import ModelConfig
from model.conversion.mappings import OUR_RULES, Mapped, mapped_tensors
from model.conversion.sources import MadeSource
from model.conversion.tensors import TensorInfo, cast_rows


def float_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [rows, n] as rows of bytes of another float dtype."""
    rows = np.ascontiguousarray(values, np.float32)
    return cast_rows(rows.reshape(len(rows), -1).view(np.uint8), "float32", dtype)


def fresh_weights(config: ModelConfig, seed: int) -> MadeSource:
    """Every logical parameter under our name, as training would draw it from (seed, name)."""
    from model.parallel.initialization import initial_rows, rows_of_a_block, standard_deviation

    tensors = {mapped.ours: TensorInfo(mapped.our_shape, config.dtype) for mapped in mapped_tensors(OUR_RULES, config)}

    def make(name: str, start: int, stop: int, out: np.ndarray) -> None:
        shape, std = tensors[name].shape, standard_deviation(name, config)
        values = initial_rows(name, shape, std, seed, start, stop).numpy()
        out[:] = float_bytes(values, config.dtype).reshape(out.shape)

    def rows_at_once(name: str) -> int:
        return rows_of_a_block(tensors[name].row_elements)

    return MadeSource(f"initial weights of seed {seed}", tensors, make, rows_at_once)


def ones(mapped: list[Mapped], dtype: str) -> MadeSource:
    """Norms that a layout has no tensors for."""
    tensors = {one.ours: TensorInfo(one.our_shape, dtype) for one in mapped}

    def make(name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = float_bytes(np.ones((stop - start, 1), np.float32), dtype)

    return MadeSource("norms of one", tensors, make)


def rows_from(
    place: str, name: str, info: TensorInfo, rows: Callable[[int, int], np.ndarray], at_once: int
) -> MadeSource:
    """A source of one tensor whose rows `rows(start, stop)` answers in float32 [stop - start, n].

    It is asked for blocks of `at_once` rows only, so that a value does not depend on who asks for which rows.
    """

    def make(_: str, start: int, stop: int, out: np.ndarray) -> None:
        parts = []
        for first in range(start - start % at_once, stop, at_once):
            values = rows(first, min(first + at_once, info.num_rows))
            parts.append(values[max(start - first, 0) : stop - first])
        out[:] = float_bytes(np.concatenate(parts), info.dtype).reshape(out.shape)

    return MadeSource(place, {name: info}, make, lambda _: at_once)
