"""Which sequence is read at which step: a pure function of (seed, stage, mixture, n).

Global sample n maps to (dataset, epoch, row) in O(1) time and with memory that does not grow with the number of rows:

1. The weights are replaced by whole shares c_1..c_k of a period of P <= 65,536 samples (`quantise_weights`).
2. One period is scheduled by Tijdeman's rule for the chairman assignment problem (R. Tijdeman, "The chairman
   assignment problem", Discrete Mathematics 32, 1980). After every prefix of n samples each dataset has been read
   n * c_i / P times to within 1 - 1 / (2k - 2), which is less than one sequence, for any weights and any number k
   of datasets. After P samples every count is exact, so the schedule repeats.
3. The q-th sample of a dataset is row q % size of epoch q // size in the order of a permutation keyed by
   (seed, stage, dataset, epoch): every row once an epoch. A stage that goes on where an earlier one stopped in a
   dataset has that stage's key and counts q from where it stopped (`Cursor`).

What is approximate: c_i / P differs from the weight asked for by at most `Mixture.weight_error` (never above 1 / P,
zero for weights with a common denominator up to 65,536 such as 0.55 / 0.25 / 0.2), and over n samples a
dataset drifts from the weight asked for by at most n times that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data_pipeline.storage.permutation import derive_key, epoch_keys, permute
from model.durable import fingerprint_of
from model.errors import Problems, UserError

MAX_PERIOD = 65_536
# Two errors closer than this are rounding noise of the weights' own arithmetic.
_WEIGHT_TOLERANCE = 1e-12


class Location(NamedTuple):
    dataset: str
    epoch: int
    row: int


class Cursor(NamedTuple):
    """A place in one order of a dataset's rows: `stream` names the order, `position` counts the rows read in it."""

    stream: str
    position: int


class Locations(NamedTuple):
    """The samples asked for, as arrays [n]."""

    datasets: np.ndarray  # int64, index into `Mixture.names`
    epochs: np.ndarray  # int64
    rows: np.ndarray  # int64


def quantise_weights(weights: np.ndarray, max_period: int = MAX_PERIOD) -> np.ndarray:
    """Whole shares (int64 [k], each >= 1) whose sum, the period, is at most `max_period`.

    weights: float64 [k], positive, any scale. Of all periods the one with the smallest worst error of a share is
    taken, the shortest of equals. Raises `UserError` when a weight is too small to get a share.
    """
    fractions = weights / weights.sum()
    best_error, best_shares = math.inf, None
    for first in range(1, max_period + 1, 8192):
        periods = np.arange(first, min(first + 8192, max_period + 1))
        shares = _largest_remainder(fractions, periods)
        errors = np.abs(shares / periods[:, None] - fractions).max(axis=1)
        errors[(shares < 1).any(axis=1)] = math.inf
        chosen = int(np.argmax(errors <= errors.min() + _WEIGHT_TOLERANCE))
        if errors[chosen] < best_error - _WEIGHT_TOLERANCE:
            best_error, best_shares = float(errors[chosen]), shares[chosen]
    if best_shares is None:
        raise UserError(
            "a dataset's weight is too small beside the others",
            expected=f"at least {1 / max_period:.2g} of the sum of the weights",
            got=f"{fractions.min():.2g}",
            fix="raise that weight, or set it to 0 to leave the dataset out",
        )
    return best_shares


def _largest_remainder(fractions: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """Round fractions * period to whole shares that sum to the period; int64 [periods, k]."""
    exact = fractions[None, :] * periods[:, None]
    # A share that is whole but for rounding noise must not lose one to the floor.
    shares = np.floor(exact + 1e-9).astype(np.int64)
    missing = periods - shares.sum(axis=1)
    order = np.argsort(-(exact - shares), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    return shares + (ranks < missing[:, None])


def schedule_period(shares: np.ndarray) -> np.ndarray:
    """One period: which dataset is read at each of its samples; uint16 [P] from shares int [k] with sum P.

    Item j (from 0) of a dataset with share c is released once n * c / P - j >= 1 / (2k - 2), n counted from 1; of
    the released items the one with the earliest deadline (j + 1 - 1 / (2k - 2)) * P / c comes next.
    """
    num_datasets, period = len(shares), int(shares.sum())
    if num_datasets == 1:
        return np.zeros(period, np.uint16)
    scale = 2 * num_datasets - 2
    common = math.lcm(*(int(share) for share in shares))  # whole deadlines: floats would break ties at random
    factors = [common // int(share) for share in shares]
    schedule = np.empty(period, np.uint16)
    waiting = [(_release(0, int(share), period, scale), index, 0) for index, share in enumerate(shares)]
    heapq.heapify(waiting)
    released: list[tuple[int, int, int]] = []
    for number in range(1, period + 1):
        while waiting and waiting[0][0] <= number:
            _, index, item = heapq.heappop(waiting)
            heapq.heappush(released, ((scale * (item + 1) - 1) * factors[index], index, item))
        _, index, item = heapq.heappop(released)
        schedule[number - 1] = index
        if item + 1 < shares[index]:
            heapq.heappush(waiting, (_release(item + 1, int(shares[index]), period, scale), index, item + 1))
    return schedule


def _release(item: int, share: int, period: int, scale: int) -> int:
    """The first n with scale * (n * share - item * period) >= period."""
    return -(-(period + scale * item * period) // (scale * share))


class Mixture:
    """Random access to the order in which the rows of several datasets are read.

    `sizes`: rows of each dataset. `weights`: relative, any scale; a dataset of weight 0 is never read. `stage`: name
    of the stage that reads; stages of other names have other orders. `cursors`: datasets that an earlier stage has
    read, and where it stopped. The order does not depend on the order of the mappings' keys.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
        stage: str = "",
        cursors: Mapping[str, Cursor] | None = None,
    ):
        _check(sizes, weights)
        self.seed = int(seed)
        self.names = [name for name in sorted(sizes) if weights[name] > 0]
        self.sizes = np.array([sizes[name] for name in self.names], np.int64)
        asked = np.array([weights[name] for name in self.names], np.float64)
        self.shares = quantise_weights(asked)
        self.period = int(self.shares.sum())
        self.weight_error = float(np.abs(self.shares / self.period - asked / asked.sum()).max())
        self._schedule = schedule_period(self.shares)
        self._ranks = _occurrence_ranks(self._schedule, len(self.names))
        known = cursors or {}
        self.cursors = [known.get(name, Cursor(f"{self.seed}/{stage}/{name}", 0)) for name in self.names]
        self._keys = [derive_key("mixture", cursor.stream) for cursor in self.cursors]
        self._positions = np.array([cursor.position for cursor in self.cursors], np.int64)
        described = {
            "seed": self.seed,
            "period": self.period,
            "datasets": {
                name: [int(size), int(share), *cursor]
                for name, size, share, cursor in zip(self.names, self.sizes, self.shares, self.cursors, strict=True)
            },
        }
        self.fingerprint = fingerprint_of(described)

    def locate(self, n: int) -> Location:
        """Dataset, epoch and row of global sample n >= 0."""
        located = self.locate_many(np.array([n], np.int64))
        return Location(self.names[located.datasets[0]], int(located.epochs[0]), int(located.rows[0]))

    def locate_many(self, samples: np.ndarray) -> Locations:
        """The same for many samples, int64 [n]."""
        samples = np.asarray(samples, np.int64)
        cycles, phases = np.divmod(samples, self.period)
        datasets = self._schedule[phases].astype(np.int64)
        ordinals = self._positions[datasets] + cycles * self.shares[datasets] + self._ranks[phases]
        epochs, indices = np.divmod(ordinals, self.sizes[datasets])
        rows = np.empty_like(indices)
        for dataset in np.unique(datasets):
            here = datasets == dataset
            keys = epoch_keys(self._keys[dataset], epochs[here])
            rows[here] = permute(indices[here], int(self.sizes[dataset]), keys)
        return Locations(datasets, epochs, rows)


def count_samples(schedule: np.ndarray, shares: np.ndarray, num_samples: int) -> np.ndarray:
    """How many of the first samples are of each dataset; int64 [k]. `schedule` as `schedule_period(shares)`."""
    cycles, phase = divmod(num_samples, len(schedule))
    return cycles * shares + np.bincount(schedule[:phase], minlength=len(shares))


def _occurrence_ranks(schedule: np.ndarray, num_datasets: int) -> np.ndarray:
    """How many times the dataset at each position came before within the period; int64 [P]."""
    ranks = np.empty(len(schedule), np.int64)
    for dataset in range(num_datasets):
        here = schedule == dataset
        ranks[here] = np.arange(np.count_nonzero(here))
    return ranks


def _check(sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
    problems = Problems()
    problems.check(
        set(sizes) == set(weights), "mixture", f"weights {sorted(weights)} are not of datasets {sorted(sizes)}"
    )
    for name, weight in sorted(weights.items()):
        key = f"datasets.{name}"
        fine = math.isfinite(weight) and weight >= 0
        problems.check(fine, f"{key}.weight", f"must be a finite number >= 0, got {weight}")
        empty = weight > 0 and sizes.get(name, 1) < 1
        problems.check(not empty, key, "has no rows", f"{key}.weight=0")
    some = any(weight > 0 for weight in weights.values())
    problems.check(some, "mixture", "no dataset has a positive weight")
    problems.raise_if_any()
