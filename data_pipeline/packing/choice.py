"""Which documents of a pool are packed: not those that are removed or alike, and each in one part of the packed folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from data_pipeline.packing.duplicates import Duplicates, Left, Rule, find_duplicates
from data_pipeline.packing.held_out import HeldOutSet, sets_of
from data_pipeline.packing.pool import Pool

TRAINING = ""  # the part of a packed folder that no held-out set has
_log = logging.getLogger(__name__)


class Choice:
    """Found once for all parts of a packed folder, when it is first asked for.

    removed: ids of documents that are left out. held_out: sets that have parts of their own. rule: how far documents may be
    alike, None for no bound.
    """

    def __init__(self, pool: Pool, removed: frozenset[int], held_out: Mapping[str, HeldOutSet], rule: Rule | None):
        self.pool, self.removed, self.held_out, self.rule = pool, removed, held_out, rule
        self.names = sorted(held_out)

    @property
    def depends_on_all(self) -> bool:
        """Does it depend on every token file what becomes of a document?"""
        return bool(self.removed or self.held_out or self.rule)

    @cached_property
    def ids(self) -> np.ndarray:
        return self.pool.document_ids()

    @cached_property
    def is_removed(self) -> np.ndarray:
        """bool [N]: those that the list names."""
        if not self.removed:
            return np.zeros(len(self.pool), bool)
        return np.isin(self.ids, np.array(sorted(self.removed), np.uint64))

    @cached_property
    def duplicates(self) -> Duplicates:
        if self.rule is None:
            return Duplicates()
        return find_duplicates(self.pool, self.ids, self.is_removed, self.rule)

    @cached_property
    def left_out(self) -> dict[int, Left]:
        """By number in the pool; `like` is None where the document itself was listed."""
        listed = dict.fromkeys(np.flatnonzero(self.is_removed).tolist(), Left("removed", None))
        _log.info("%d of %d removed documents are here", len(listed), len(self.removed))
        return listed | self.duplicates.left_out

    @cached_property
    def is_left_out(self) -> np.ndarray:
        """bool [N]: those of `left_out`."""
        found = np.zeros(len(self.pool), bool)
        found[list(self.left_out)] = True
        return found

    @cached_property
    def sets(self) -> np.ndarray | None:
        """Number of the held-out set of every document, uint8 [N], 0 for the rows to train on; None where there are no sets."""
        if not self.held_out:
            return None
        sets = sets_of(self.held_out, self.ids)
        sets[self.is_left_out] = 0  # they are counted once, beside the rows to train on
        return sets

    def number_of(self, part: str) -> int:
        return 1 + self.names.index(part) if part != TRAINING else 0
