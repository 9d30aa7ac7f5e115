"""One period of a mixture: whole shares for its weights, and which dataset is read at each of its places.

The places follow Tijdeman's rule for the chairman assignment problem (R. Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980). For a dataset with share c of a period P and k datasets in all, its item j (from 0) is released once
n * c / P - j >= 1 / (2k - 2), n counted from 1; of the released items the one with the earliest deadline
(j + 1 - 1 / (2k - 2)) * P / c comes next, of equal ones that of the first dataset.
"""

from __future__ import annotations

import bisect
import heapq
import math

import numpy as np

from model.errors import UserError

MAX_PERIOD = 65_536
# Weights as people write them have a common denominator below this; longer periods need not be tried then.
_FIRST_PERIODS = 1024
_PERIODS_AT_ONCE = 8192
# Two errors closer than this are rounding noise of the weights' own arithmetic.
_WEIGHT_TOLERANCE = 1e-12
_PROBED_PERIODS, _NUM_PROBES = (
    2048,
    32,
)  # how many are looked at, and worked out, to know how near the nearest is at least
_NUM_ROUGH = 3  # weights that are looked at roughly at first
_TURN_ERROR = 2e-5  # of a rough distance: 65,536 / 2**33 of rounding, and as much again
_BLOCK = 256  # places that are found together
_WARM_UP = 16  # places a dataset, before a block, from which its beginning is looked for at first
_SEEN_FROM_NEAR, _LOOKED_FOR = 64, 8  # places a dataset after which so many datasets are looked for one by one


def quantise_weights(weights: np.ndarray, max_period: int = MAX_PERIOD) -> np.ndarray:
    """Whole shares (int64 [k], each >= 1) whose sum, the period, is at most `max_period`.

    weights: float64 [k], positive, any scale. Of all periods the one with the smallest worst error of a share is
    taken, the shortest of equals. Raises `UserError` when a weight is too small to get a share.
    """
    fractions = weights / weights.sum()
    # No longer period is nearer than one without an error.
    best_error, best_shares = _nearest(fractions, _exact_periods(fractions, min(_FIRST_PERIODS - 1, max_period)))
    if best_error > _WEIGHT_TOLERANCE:
        best_error, best_shares = _nearest(fractions, _promising_periods(fractions, max_period))
    if best_shares is None:
        raise UserError(
            "a dataset's weight is too small beside the others",
            expected=f"at least {1 / max_period:.2g} of the sum of the weights",
            got=f"{fractions.min():.2g}",
            fix="raise that weight, or set it to 0 to leave the dataset out",
        )
    return best_shares


def _nearest(fractions: np.ndarray, periods: np.ndarray) -> tuple[float, np.ndarray | None]:
    """The worst error of the nearest period and its shares; infinity and None where every period leaves some share out.

    Periods (ascending int64) are compared block by block, those of a block that are as near as rounding can tell for the
    shortest of them.
    """
    ends = np.array([_FIRST_PERIODS, *range(_PERIODS_AT_ONCE + 1, MAX_PERIOD + 1, _PERIODS_AT_ONCE)])
    blocks = np.searchsorted(ends, periods, side="right")
    best_error, best_shares = math.inf, None
    for block in dict.fromkeys(blocks.tolist()):
        here = periods[blocks == block]
        shares, errors = _shares_and_errors(fractions, here)
        chosen = int(np.argmax(errors <= errors.min() + _WEIGHT_TOLERANCE))
        if errors[chosen] < best_error - _WEIGHT_TOLERANCE:
            best_error, best_shares = float(errors[chosen]), shares[chosen]
        if best_error <= _WEIGHT_TOLERANCE:
            break
    return best_error, best_shares


def _exact_periods(fractions: np.ndarray, max_period: int) -> np.ndarray:
    """Periods up to `max_period`, ascending int64, that have the weights but for rounding noise, if each has a share."""
    periods = np.arange(1, max_period + 1)
    return periods[(_distances(fractions[:, None], periods) <= 4 * _WEIGHT_TOLERANCE * periods).all(axis=0)]


def _promising_periods(fractions: np.ndarray, max_period: int) -> np.ndarray:
    """Periods up to `max_period`, ascending int64, without those that are surely farther from the weights than the nearest.

    Whatever a share is rounded to, it is no nearer than the whole number nearest to fraction * period.
    """
    probed = np.arange(max(1, max_period + 1 - _PROBED_PERIODS), max_period + 1)
    least = np.max([_distances(fraction, probed) for fraction in fractions], axis=0) / probed
    for probes in (probed[np.argsort(least)[:_NUM_PROBES]], probed):
        reached = float(_shares_and_errors(fractions, probes)[1].min())
        if math.isfinite(reached):
            break
    else:
        return np.arange(1, max_period + 1)  # a weight so small that few periods have a share for it
    # First roughly, in turns of 2**32 that wrap as whole numbers do; in pieces that the processor's cache and malloc's hold.
    limit = min(2**31 - 1, int((reached * max_period + _TURN_ERROR) * 2**32))
    steps = [np.uint32(round(fraction * 2**32) % 2**32) for fraction in fractions[:_NUM_ROUGH]]
    found = []
    for first in range(1, max_period + 1, _PERIODS_AT_ONCE):
        numbers = np.arange(first, min(first + _PERIODS_AT_ONCE, max_period + 1), dtype=np.uint32)
        near = np.ones(len(numbers), bool)
        for step in steps:
            near &= np.abs((numbers * step).view(np.int32)) <= limit
        found.append(numbers[near])
    periods = np.concatenate(found).astype(np.int64)
    for fraction in fractions:
        periods = periods[_distances(fraction, periods) <= (reached + 4 * _WEIGHT_TOLERANCE) * periods]
    return periods


def _distances(fraction: float | np.ndarray, periods: np.ndarray) -> np.ndarray:
    """From fraction * period to the nearest whole number."""
    exact = fraction * periods
    found: np.ndarray = np.abs(exact - np.rint(exact))
    return found


def _shares_and_errors(fractions: np.ndarray, periods: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares (int64 [periods, k]) and their worst errors (float64 [periods]), infinite where a dataset has no share."""
    shares = _largest_remainder(fractions, periods)
    errors = np.abs(shares / periods[:, None] - fractions).max(axis=1)
    errors[(shares < 1).any(axis=1)] = math.inf
    return shares, errors


def _largest_remainder(fractions: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """Round fractions * period to whole shares that sum to the period; int64 [periods, k]."""
    exact = fractions[None, :] * periods[:, None]
    # A share that is whole but for rounding noise must not lose one to the floor.
    shares = np.floor(exact + 1e-9).astype(np.int64)
    missing = periods - shares.sum(axis=1)
    order = np.argsort(-(exact - shares), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    return shares + (ranks < missing[:, None])


class Period:
    """Random access to one period: its places are found in blocks, when they are asked for.

    shares: int64 [k], each >= 1. A block costs what its places cost, wherever it lies: where a block begins, the items that are
    released and not due yet are read or waiting, and only which of them is not known. Of the possible states the one that waits for
    the earliest deadlines and the one that waits for the latest enclose all others, and stay around them as the rule goes on:
    what the earlier one waits for is never due later. So the rule is followed from both, some places before the block, until they
    are one; where they are not, from farther before, at last from the period's beginning. A dataset that is read seldom is looked
    for otherwise (`_is_read`).
    """

    def __init__(self, shares: np.ndarray):
        self.shares = np.asarray(shares, np.int64)
        self.length = int(self.shares.sum())
        self._scale = max(1, 2 * len(self.shares) - 2)  # one dataset alone has every place, whatever the scale
        self._datasets = np.empty(self.length, np.uint16)
        self._ranks = np.empty(self.length, np.uint16)
        self._counts: dict[int, np.ndarray] = {
            0: np.zeros(len(self.shares), np.int64)
        }  # before a place, of each dataset
        self._found = np.zeros(-(-self.length // _BLOCK), bool)

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset of each place, int64 [n] in [0, length), and how often it comes before in the period."""
        asked = np.zeros(len(self._found), bool)
        asked[places // _BLOCK] = True
        missing = np.flatnonzero(asked & ~self._found)
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1):
            if len(run):
                self._find(int(run[0]), int(run[-1]) + 1)
        return self._datasets[places].astype(np.int64), self._ranks[places].astype(np.int64)

    def counts(self, place: int) -> np.ndarray:
        """How often each dataset comes before a place; int64 [k]."""
        first = place // _BLOCK * _BLOCK
        if first < place:
            self.locate(np.array([first]))
        return self._counts_before(first) + self._count(self._datasets[first:place])

    def _find(self, first_block: int, end_block: int) -> None:
        """Blocks side by side."""
        first, end = first_block * _BLOCK, min(end_block * _BLOCK, self.length)
        counts = self._counts_before(first)
        datasets = self._follow(first, end, counts)
        self._datasets[first:end] = datasets
        for dataset in range(len(self.shares)):
            here = np.flatnonzero(datasets == dataset)
            self._ranks[first + here] = counts[dataset] + np.arange(len(here))
        self._counts[end] = counts + self._count(datasets)
        self._found[first_block:end_block] = True

    def _counts_before(self, place: int) -> np.ndarray:
        warm_up = _WARM_UP * len(self.shares)
        while place not in self._counts:
            first = place - warm_up if place > 4 * warm_up else 0
            states = self._possible_counts(first) if first else [self._counts[0]]
            after = [counts + self._count(self._follow(first, place, counts)) for counts in states]
            counts, unsure = self._enclosed(place, after[0], after[-1]) if len(after) > 1 else (after[0], [])
            if not unsure or (warm_up >= _SEEN_FROM_NEAR * len(self.shares) and len(unsure) <= _LOOKED_FOR):
                for dataset in unsure:
                    counts[dataset] += self._is_read(dataset, int(counts[dataset]), place)
                self._counts[place] = counts
            warm_up *= 4
        return self._counts[place]

    def _enclosed(self, place: int, early: np.ndarray, late: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """How often each dataset comes before a place, as far as two states that enclose all others say, and of which they do not.

        By deadline, what waits lies between what waits in the one and what waits in the other, one by one. So an item that both
        have at the same place of that order waits, one that lies between none of the pairs is read, and any other may be
        either, also where both states have read it; it is not counted here.
        """
        counts, unsure = self._released(place), []
        first, last = self._waiting(place, early), self._waiting(place, late)
        for dataset, due in enumerate(self._due(place).tolist()):
            if due >= counts[dataset]:  # nothing of it is open
                continue
            key = (float(self._deadlines(np.array([dataset]), np.array([due]))[0]), dataset)
            begin, end = bisect.bisect_left(last, key), bisect.bisect_right(first, key)
            if begin < end:  # it lies between these pairs
                counts[dataset] = due
                if not any(first[pair] == last[pair] for pair in range(begin, end)):
                    unsure.append(dataset)
        return counts, unsure

    def _waiting(self, place: int, counts: np.ndarray) -> list[tuple[float, int]]:
        """Deadline and dataset of each item that is released and not read, in the order of the rule."""
        num_items = np.maximum(self._released(place) - counts, 0)
        datasets = np.repeat(np.arange(len(self.shares)), num_items)
        items = np.arange(len(datasets)) - np.repeat(np.cumsum(num_items) - num_items, num_items) + counts[datasets]
        return sorted(zip(self._deadlines(datasets, items).tolist(), datasets.tolist(), strict=True))

    def _is_read(self, dataset: int, item: int, place: int) -> bool:
        """Is an item, released already, read before a place? It is when it and all that goes before it, by the rule, fill more places
        than what goes before it does alone: of n places that has the smallest of A(m) + n - m, A(m) being how many of it are
        released by m, as it leaves no place empty while something waits.
        """
        share = int(self.shares[dataset])
        due = (self._scale * (item + 1) - 1) * self.shares
        at_once = (np.arange(len(self.shares)) > dataset).astype(
            np.int64
        )  # equal deadlines: the first dataset goes before
        ahead = np.minimum((due + share - at_once) // (self._scale * share), self.shares)
        ahead[dataset] = item
        places = np.arange(place + 1)
        slack = -places
        for number, most in zip(self.shares.tolist(), ahead.tolist(), strict=True):
            released = (self._scale * number * places - self.length) // (self._scale * self.length) + 1
            slack += np.minimum(released, most)
        release = -(-self.length * (1 + self._scale * item) // (self._scale * share))
        return bool(slack[:release].min() > slack[release:].min())

    def _possible_counts(self, place: int) -> list[np.ndarray]:
        """How often each dataset may come before a place: waiting for the earliest deadlines, and for the latest."""
        released, open_ones = self._released(place), self._open_ones(place)
        num_waiting = int(released.sum()) - place
        found = []
        for waiting in (open_ones[:num_waiting], open_ones[len(open_ones) - num_waiting :]):
            found.append(released.copy())
            found[-1][waiting] -= 1
        return found

    def _due(self, place: int) -> np.ndarray:
        """Items of each dataset that are read for sure; int64 [k].

        The rule keeps its deadlines, n * c / P > j + 1 - 1 / (2k - 2) for the items due before n; of two that are due
        at the very same place one is read after it.
        """
        found: np.ndarray = (self._scale * place * self.shares + self.length - 1) // (self._scale * self.length)
        return found

    def _open_ones(self, place: int) -> np.ndarray:
        """Datasets with an item that is released and not due, at most one each, by its deadline."""
        due = self._due(place)
        found = np.flatnonzero(self._released(place) > due)
        ordered: np.ndarray = found[np.lexsort((found, self._deadlines(found, due[found])))]
        return ordered

    def _follow(self, first: int, end: int, counts: np.ndarray) -> np.ndarray:
        """The datasets at places first..end - 1 by the rule, from how often each came before; intp [end - first]."""
        num_items = self._released(end) - counts
        datasets = np.repeat(np.arange(len(self.shares)), num_items)
        starts = np.cumsum(num_items) - num_items
        items = np.arange(len(datasets)) - starts[datasets] + counts[datasets]
        by_deadline = np.lexsort((datasets, self._deadlines(datasets, items)))
        datasets, items = datasets[by_deadline], items[by_deadline]
        releases = -(-(self.length * (1 + self._scale * items)) // (self._scale * self.shares[datasets]))
        coming = np.argsort(releases, kind="stable")
        times, names = releases[coming].tolist(), coming.tolist()  # an item's name is its place by deadline
        times.append(end + 1)
        waiting: list[int] = []
        taken, arrived = [], 0
        for number in range(first + 1, end + 1):
            while times[arrived] <= number:
                heapq.heappush(waiting, names[arrived])
                arrived += 1
            taken.append(heapq.heappop(waiting))
        return datasets[taken]

    def _released(self, place: int) -> np.ndarray:
        """Items of each dataset released by n = place; int64 [k]."""
        found = (self._scale * place * self.shares - self.length) // (self._scale * self.length) + 1
        return np.clip(found, 0, self.shares)

    def _deadlines(self, datasets: np.ndarray, items: np.ndarray) -> np.ndarray:
        """In periods / (2k - 2). One rounding of an exact fraction: equal deadlines are equal, and different ones of shares below
        2**16 differ by more than rounding as long as 2k - 2 is below 2**20."""
        return (self._scale * (items + 1) - 1) / self.shares[datasets]

    def _count(self, datasets: np.ndarray) -> np.ndarray:
        return np.bincount(datasets, minlength=len(self.shares))
