"""The order of samples: weights hold at every prefix, every row comes once an epoch, nothing depends on the access."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading import periods
from data_pipeline.loading.mixture import Cursor, Mixture
from data_pipeline.loading.periods import MAX_PERIOD, Period, quantise_weights
from data_pipeline.storage.permutation import derive_key, epoch_keys, permute
from model.errors import UserError

SHARES = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 300)), min_size=2, max_size=12)
WEIGHTS = st.lists(st.floats(0.1, 100), min_size=2, max_size=12)


def schedule_by_the_rule(shares: list[int]) -> list[int]:
    """A whole period from its beginning, deadlines as whole numbers."""
    scale, period, common = max(1, 2 * len(shares) - 2), sum(shares), math.lcm(*shares)

    def release(index: int, item: int) -> int:  # the first n with scale * (n * share - item * period) >= period
        return -(-(period + scale * item * period) // (scale * shares[index]))

    waiting = [(release(index, 0), index, 0) for index in range(len(shares))]
    heapq.heapify(waiting)
    released: list[tuple[int, int, int]] = []
    schedule = []
    for number in range(1, period + 1):
        while waiting and waiting[0][0] <= number:
            _, index, item = heapq.heappop(waiting)
            heapq.heappush(released, ((scale * (item + 1) - 1) * common // shares[index], index, item))
        _, index, item = heapq.heappop(released)
        schedule.append(index)
        if item + 1 < shares[index]:
            heapq.heappush(waiting, (release(index, item + 1), index, item + 1))
    return schedule


def schedule_period(shares: np.ndarray) -> np.ndarray:
    return Period(shares).locate(np.arange(shares.sum()))[0]


@settings(max_examples=60, deadline=None)
@given(
    shares=st.one_of(SHARES, st.lists(st.one_of(st.integers(1, 9), st.integers(1, 4000)), min_size=1, max_size=5)),
    near=st.sampled_from([1, 16, 10**6]),
    data=st.data(),
)
def test_any_places_of_a_period_are_those_of_the_rule(shares, near, data):
    """Whatever is asked for, in whichever order: a block is found without those before it."""
    expected = schedule_by_the_rule(shares)
    seen: Counter[int] = Counter()
    ranks = [seen.update([dataset]) or seen[dataset] - 1 for dataset in expected]
    period = Period(np.array(shares))
    for first in data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=3)):
        places = np.arange(first, min(first + 150, len(expected)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(periods, "_WARM_UP", 1)  # too few places at first, so that it has to go farther back
            patch.setattr(periods, "_SEEN_FROM_NEAR", near)  # or to look for datasets one by one
            datasets, numbers = period.locate(places)
        assert datasets.tolist() == expected[first : first + 150]
        assert numbers.tolist() == ranks[first : first + 150]
        assert period.counts(first).tolist() == [expected[:first].count(index) for index in range(len(shares))]


@pytest.mark.parametrize("near", [1, 64])
@pytest.mark.parametrize(
    "shares",
    [
        [8, 145, 293, 897, 897],  # both enclosing states have read an item that waits
        [693, 327],  # two items due at the same place: one is read after it
        [7, 3291, 92, 3029, 1],
        [3275, 3433, 9, 537, 1],
    ],
)
def test_every_block_is_found_without_any_other(shares: list[int], near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periods, "_SEEN_FROM_NEAR", near)
    if near == 1:
        monkeypatch.setattr(periods, "_WARM_UP", 1)
    expected = schedule_by_the_rule(shares)
    for first in range(0, len(expected), periods._BLOCK):
        places = np.arange(first, min(first + periods._BLOCK, len(expected)))
        found = Period(np.array(shares)).locate(places)[0]
        assert found.tolist() == expected[first : first + periods._BLOCK]


def quantise_by_trying_all(weights: np.ndarray, max_period: int) -> list[int]:
    fractions = weights / weights.sum()
    best_error, best = math.inf, np.zeros(0, np.int64)
    ends = [min(end, max_period + 1) for end in (1024, *range(8193, max_period + 8193, 8192))]
    for first, end in zip([1, *ends], ends, strict=False):
        if first < end and best_error > 1e-12:
            shares, errors = periods._shares_and_errors(fractions, np.arange(first, end))
            chosen = int(np.argmax(errors <= errors.min() + 1e-12))
            if errors[chosen] < best_error - 1e-12:
                best_error, best = float(errors[chosen]), shares[chosen]
    return best.tolist()


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.one_of(st.floats(0.001, 1), st.integers(1, 400)), min_size=1, max_size=10),
    max_period=st.sampled_from([900, 5000, 20_000]),
)
def test_shares_are_those_of_trying_every_period(weights, max_period):
    expected = quantise_by_trying_all(np.array(weights, np.float64), max_period)
    if expected:
        assert quantise_weights(np.array(weights, np.float64), max_period).tolist() == expected
    else:
        with pytest.raises(UserError, match="too small"):
            quantise_weights(np.array(weights, np.float64), max_period)


def test_the_order_of_runs_stays():
    """Rows that earlier versions read at these samples, of weights without a common denominator, on both sides of a change."""
    sizes = {f"d{number}": 1000 + 7**number for number in range(8)}
    weights = {name: (2 + number) ** 0.5 for number, name in enumerate(sizes)}
    mixture = Mixture(sizes, weights, 11, "stage", changes=[(100_000, dict.fromkeys(sizes, 1.0))])
    starts_and_ends = (60_000, 61_024), (99_500, 100_500), (290_000 * 1024, 290_001 * 1024)
    samples = np.concatenate([np.arange(*one) for one in starts_and_ends])
    content = np.stack(mixture.locate_many(samples)).astype("<i8").tobytes()
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "d3db1c56f1073539"
    assert mixture.fingerprint == "4687694538219ea737d214e17d59121f"


def worst_discrepancy(schedule: np.ndarray, shares: list[int]) -> Fraction:
    """Largest distance of any dataset's count from its share, over every prefix; exact."""
    period = sum(shares)
    counts = np.cumsum(schedule[:, None] == np.arange(len(shares)), axis=0)
    prefixes = np.arange(1, len(schedule) + 1)[:, None]
    return Fraction(int(np.abs(counts * period - prefixes * np.array(shares)).max()), period)


@settings(max_examples=150, deadline=None)
@given(shares=SHARES)
def test_every_prefix_of_the_schedule_is_within_one_sequence(shares):
    schedule = schedule_period(np.array(shares))
    assert Counter(schedule.tolist()) == Counter(dict(enumerate(shares)))
    assert worst_discrepancy(schedule, shares) <= 1 - Fraction(1, 2 * len(shares) - 2)


@pytest.mark.parametrize("shares", [[1, 1, 998], [1] * 12, [997, 1, 1, 1], [2, 3, 5, 7, 11, 13], [499, 500]])
def test_extreme_shares_are_within_one_sequence(shares):
    schedule = np.tile(schedule_period(np.array(shares)), 3)
    assert worst_discrepancy(schedule, shares) < 1


@settings(max_examples=8, deadline=None)
@given(weights=WEIGHTS)
def test_located_samples_follow_the_weights_at_every_prefix(weights):
    mixture = Mixture(dict.fromkeys(map(str, range(len(weights))), 50), dict(enumerate_names(weights)), 0)
    assert mixture.period <= MAX_PERIOD
    num_samples = 2000
    datasets = mixture.locate_many(np.arange(num_samples)).datasets
    asked = np.array([dict(enumerate_names(weights))[name] for name in mixture.names])
    counts = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, num_samples + 1)[:, None] * (asked / asked.sum())
    assert np.abs(counts - ideal).max() <= 1 + num_samples * mixture.weight_error
    assert mixture.weight_error <= 1 / MAX_PERIOD


def enumerate_names(weights: list[float]) -> list[tuple[str, float]]:
    return [(str(index), weight) for index, weight in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([0.55, 0.25, 0.15, 0.05], [11, 5, 3, 1]), ([0.1 + 0.2, 0.7], [3, 7]), ([5.0], [1]), ([1 / 3] * 3, [1, 1, 1])],
)
def test_weights_with_a_common_denominator_are_exact(weights, shares):
    assert quantise_weights(np.array(weights)).tolist() == shares


@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=3))
def test_no_shorter_or_equal_period_is_nearer_to_the_weights(weights):
    fractions = np.array(weights) / sum(weights)
    shares = quantise_weights(np.array(weights), max_period=24)
    error = np.abs(shares / shares.sum() - fractions).max()
    for period in range(len(weights), 25):
        for first in range(1, period):
            for second in range(1, period - first + 1) if len(weights) == 3 else [period - first]:
                candidate = np.array([first, second, period - first - second][: len(weights)])
                if candidate.min() >= 1 and candidate.sum() == period:
                    assert error <= np.abs(candidate / period - fractions).max() + 1e-11


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_one_value_goes_where_it_goes_among_many():
    """By numpy's numbers as by Python's."""
    values = np.arange(0, 40_000, 7)
    for size, key in ((40_000, 2**64 - 1), (70_001, 3)):
        together = permute(values, size, key)
        assert together[:300].tolist() == [int(permute(np.array([value]), size, key)[0]) for value in values[:300]]


def test_permutations_look_random_and_differ_by_key():
    size, num_keys = 64, 400
    images = np.array([permute(np.arange(size), size, derive_key("test", key)) for key in range(num_keys)])
    counts = np.array([np.bincount(images[:, index], minlength=size) for index in range(size)])
    chi_square = ((counts - num_keys / size) ** 2 / (num_keys / size)).sum() / (size * (size - 1))
    assert 0.9 < chi_square < 1.1
    neighbours = np.abs(np.diff(images, axis=1)) == 1
    assert 0.5 < neighbours.mean() / (2 / size) < 1.5


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 2**32), data=st.data())
def test_every_row_comes_exactly_once_an_epoch(sizes, seed, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    names = [f"d{index}" for index in range(len(sizes))]
    mixture = Mixture(dict(zip(names, sizes, strict=True)), dict(zip(names, weights, strict=True)), seed)
    located = mixture.locate_many(np.arange(400))
    for index, name in enumerate(mixture.names):
        size = sizes[names.index(name)]
        here = located.datasets == index
        epochs, rows = located.epochs[here], located.rows[here]
        assert np.array_equal(epochs, np.arange(len(epochs)) // size)
        for epoch in range(len(rows) // size):
            assert sorted(rows[epochs == epoch]) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), first_sample=st.sampled_from([0, 37]))
def test_weights_change_where_they_are_said_to_and_rows_still_come_once_an_epoch(data, first_sample):
    names = ["a", "b", "c"]
    weights = st.lists(st.integers(0, 7), min_size=3, max_size=3).filter(any)
    sizes = dict(zip(names, data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)), strict=True))
    starts = data.draw(st.lists(st.integers(1, 250), max_size=3, unique=True))
    phases = [(start, dict(zip(names, data.draw(weights), strict=True))) for start in [0, *starts]]
    (_, first), *changes = phases
    mixture = Mixture(sizes, first, 3, changes=changes, first_sample=first_sample)
    located = mixture.locate_many(np.arange(first_sample, 300))
    alone = [Mixture(sizes, weights_of_phase, 3) for _, weights_of_phase in phases]
    order = [[one.names[index] for index in one.locate_many(np.arange(300)).datasets] for one in alone]
    seen: dict[str, list[int]] = {name: [] for name in names}
    for place, sample in enumerate(range(first_sample, 300)):
        begins, phase = max((start, number) for number, (start, _) in enumerate(phases) if start <= sample)
        name = order[phase][sample - max(begins, first_sample)]  # as that phase by itself has it
        assert mixture.names[located.datasets[place]] == name
        rows, size = seen[name], sizes[name]
        assert located.epochs[place] == len(rows) // size
        assert located.rows[place] not in rows[len(rows) // size * size :]
        rows.append(int(located.rows[place]))
        if sample % 7 == 0:
            assert mixture.schedule.counts(sample + 1).tolist() == [len(seen[name]) for name in mixture.names]
    again = Mixture(sizes, first, 3, changes=changes[::-1], first_sample=first_sample)
    assert again.locate(299).row == located.rows[-1]
    assert again.fingerprint == mixture.fingerprint
    if mixture.schedule.first_samples.tolist() != [0]:
        assert mixture.fingerprint != Mixture(sizes, first, 3).fingerprint


def test_the_order_of_older_checkpoints_is_kept():
    """Figures of version 0.1 before weights could change: a run of today goes on with its checkpoints."""
    mixture = Mixture({"a": 100, "b": 5}, {"a": 1, "b": 3}, 7, "s", {"b": Cursor("x", 2)})
    assert mixture.fingerprint == "834d4fdc836ab09072a5a847c0c20ff3"
    rows = [2, 84, 3, 4, 3, 32, 1, 0, 2, 1, 4, 1, 2, 97, 3, 0, 4, 98, 4, 2, 3, 21, 0, 1, 4, 96, 3, 1, 0, 11]
    assert mixture.locate_many(np.arange(30)).rows.tolist() == rows


def test_access_order_and_key_order_do_not_matter():
    sizes, weights = {"b": 70, "a": 30, "c": 9}, {"a": 0.2, "b": 0.5, "c": 0.3}
    mixture = Mixture(sizes, weights, seed=5)
    again = Mixture(dict(sorted(sizes.items())), dict(sorted(weights.items(), reverse=True)), seed=5)
    samples = np.random.default_rng(0).integers(0, 10**12, 200)
    many = mixture.locate_many(samples)
    for index, sample in enumerate(samples.tolist()):
        one = again.locate(sample)
        assert one == (mixture.names[many.datasets[index]], many.epochs[index], many.rows[index])
    assert mixture.fingerprint == again.fingerprint


def test_epochs_and_seeds_differ_and_the_fingerprint_knows():
    def rows(seed: int, first: int) -> list[int]:
        return Mixture({"a": 100}, {"a": 1}, seed).locate_many(np.arange(first, first + 100)).rows.tolist()

    assert len({tuple(rows(seed, first)) for seed in (0, 1) for first in (0, 100)}) == 4
    variants = [
        Mixture({"a": 100, "b": 5}, {"a": 1, "b": 1}, 0),
        Mixture({"a": 100, "b": 5}, {"a": 1, "b": 1}, 1),
        Mixture({"a": 101, "b": 5}, {"a": 1, "b": 1}, 0),
        Mixture({"a": 100, "b": 5}, {"a": 2, "b": 1}, 0),
        Mixture({"a": 100, "c": 5}, {"a": 1, "c": 1}, 0),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_one_epoch_has_its_own_key_in_a_vectorised_call():
    epochs = np.array([0, 1, 2, 1])
    keys = epoch_keys(7, epochs)
    together = permute(np.array([3, 3, 3, 4]), 50, keys)
    sizes = np.array([50, 50, 9, 1 << 40])
    assert permute(np.array([3, 3, 3, 4]), sizes, keys).tolist() == [
        int(permute(np.array([index]), int(size), int(key))[0])
        for index, size, key in zip([3, 3, 3, 4], sizes, keys, strict=True)
    ]
    assert together.tolist() == [
        int(permute(np.array([index]), 50, int(key))[0]) for index, key in zip([3, 3, 3, 4], keys, strict=True)
    ]
    assert len(set(keys.tolist())) == 3


def test_a_dataset_of_weight_zero_is_left_out():
    mixture = Mixture({"a": 10, "b": 0}, {"a": 1.0, "b": 0.0}, 0)
    assert mixture.names == ["a"]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ({"a": 1}, {"a": -1.0}, "finite"),
        ({"a": 1}, {"a": float("nan")}, "finite"),
        ({"a": 0}, {"a": 1.0}, "no rows"),
        ({"a": 1}, {"a": 0.0}, "no dataset has a positive weight"),
        ({"a": 1}, {"b": 1.0}, "are not of datasets"),
        ({"a": 1, "b": 1}, {"a": 1e9, "b": 1.0}, "too small"),
    ],
)
def test_impossible_mixtures_are_refused(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(sizes, weights, 0)
