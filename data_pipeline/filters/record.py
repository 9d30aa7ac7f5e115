"""What filters said of the samples of a shard: how many they were asked about and refused, and those nearest to a bound."""

from __future__ import annotations

import base64
import heapq
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.filters.scorer import as_jpeg
from data_pipeline.kinds.base import PreparedSample

NEAREST = 4  # samples kept on either side of a filter's bound, of each shard
_THUMBNAIL_SIDE = 128
_TEXT_SHOWN = 160


@dataclass
class _Side:
    """The samples nearest to the bound on one side of it, nearest first."""

    heap: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)

    def offer(self, distance: float, number: int, sample: PreparedSample, score: float) -> None:
        if len(self.heap) == NEAREST and -distance <= self.heap[0][0]:
            return
        heapq.heappush(self.heap, (-distance, -number, _shown(sample, score)))
        if len(self.heap) > NEAREST:
            heapq.heappop(self.heap)

    def sorted(self) -> list[dict[str, Any]]:
        return [shown for _, _, shown in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]


@dataclass
class _Seen:
    unit: str
    minimum: float | None
    maximum: float | None
    num_asked: int = 0
    num_refused: int = 0
    sides: tuple[_Side, _Side] = field(default_factory=lambda: (_Side(), _Side()))  # kept, refused


class FilterRecord:
    """Of one shard at a time: `lines` gives what was noted and begins anew. names: of the filters, in their order.

    A filter notes in one thread at a time; filters of different threads may note at once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._seen: dict[str, _Seen] = {}
        self._numbers = itertools.count()

    def note(
        self, name: str, unit: str, minimum: float | None, maximum: float | None, sample: PreparedSample, score: float
    ) -> None:
        """A sample that has a score. Pictures are made small for those nearest to a bound only."""
        seen = self._seen.setdefault(name, _Seen(unit, minimum, maximum))
        refused = (minimum is not None and score < minimum) or (maximum is not None and score > maximum)
        seen.num_asked += 1
        seen.num_refused += refused
        distance = min(abs(score - bound) for bound in (minimum, maximum) if bound is not None)
        seen.sides[refused].offer(distance, next(self._numbers), sample, score)

    def lines(self) -> list[str]:
        """One JSON object a filter, in the order in which they were asked."""
        found = []
        for name, seen in sorted(self._seen.items(), key=lambda one: self._names.index(one[0])):
            kept, refused = (side.sorted() for side in seen.sides)
            content = {"filter": name, "unit": seen.unit, "minimum": seen.minimum, "maximum": seen.maximum}
            content |= {"asked": seen.num_asked, "refused": seen.num_refused}
            found.append(json.dumps(content | {"nearest_kept": kept, "nearest_refused": refused}, ensure_ascii=False))
        self._seen = {}
        return found


def _shown(sample: PreparedSample, score: float) -> dict[str, Any]:
    picture = sample.pictures[0] if sample.pictures else None
    return {
        "key": sample.key,
        "score": score,
        "text": " ".join(sample.texts)[:_TEXT_SHOWN],
        "thumbnail": base64.b64encode(as_jpeg(picture, _THUMBNAIL_SIDE)).decode() if picture else None,
    }
