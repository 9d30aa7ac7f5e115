"""Permutations of range(n) that need no memory: a keyed Feistel network with cycle walking."""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spaces the inputs of the mixing function
_MASK = (1 << 64) - 1
_FEW = 8  # values that are sent through one by one


def derive_key(*parts: object) -> int:
    """A 64-bit key of the parts, the same on every machine and in every version of Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit reaches every output bit. uint64 in and out."""
    mixed = values.copy()
    _mix_in_place(mixed, np.empty_like(mixed))
    return mixed


def _mix_in_place(values: np.ndarray, scratch: np.ndarray) -> None:
    """`_mix` of an array that nobody else has; scratch: another of its size. Arrays are not allocated again and again."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        np.right_shift(values, shift, out=scratch)
        values ^= scratch
        values *= factor
    np.right_shift(values, _SHIFTS[2], out=scratch)
    values ^= scratch


def keyed_hash(values: np.ndarray, key: int) -> np.ndarray:
    """One uint64 for each value, uint64 [n], as if drawn at random; another key gives other ones."""
    with np.errstate(over="ignore"):
        return _mix(_mix(values + np.uint64(key)) ^ np.uint64(key))


def epoch_keys(base_keys: int | np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """One key for each epoch, uint64 [n] from int [n]; base_keys: one for all, or uint64 [n]."""
    with np.errstate(over="ignore"):
        return _mix(np.asarray(base_keys, np.uint64) + (epochs.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


def permute(indices: np.ndarray, size: int | np.ndarray, keys: np.ndarray | int) -> np.ndarray:
    """Where each index goes in the permutation of range(size) that its key selects.

    indices: int [n], each in [0, size). size and keys (64 bits): one for all, or one each. Returns int64 [n].
    """
    values = np.asarray(indices).astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(size, np.uint64), values.shape)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), values.shape)
    num_bits = _bits_for(sizes)
    outside = np.flatnonzero(sizes > np.uint64(1))
    # The network permutes [0, 2**num_bits), at most twice `size` here but for the tiniest sizes. Values that land
    # outside are sent through again until they come back: still a permutation.
    while len(outside) > _FEW:
        moved = _feistel(values[outside], num_bits[outside], keys[outside])
        values[outside] = moved
        outside = outside[moved >= sizes[outside]]
    for index in outside.tolist():
        values[index] = _permute_one(*(int(numbers[index]) for numbers in (values, sizes, num_bits, keys)))
    return values.astype(np.int64)


def _permute_one(value: int, size: int, num_bits: int, key: int) -> int:
    """`permute` of one value by Python's numbers: arrays of a few cost as much as arrays of a thousand."""
    right_bits = num_bits >> 1
    masks = (1 << (num_bits - right_bits)) - 1, (1 << right_bits) - 1
    while True:
        left, right = value >> right_bits, value & masks[1]
        for number in range(_NUM_ROUNDS):
            inner = _mix_one(key + (number + 1) * _GOLDEN + right & _MASK)
            left, right = right, _mix_one(inner ^ key) & masks[number % 2] ^ left
        value = (left << right_bits) | right
        if value < size:
            return value


def _mix_one(value: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> shift) * factor & _MASK
    return value ^ value >> 31


def _bits_for(sizes: np.ndarray) -> np.ndarray:
    """Bits of the largest number below each size, at least 2; uint64 [n]. Exact for sizes below 2**53."""
    exponents = np.frexp(sizes.astype(np.float64) - 1.0)[1]
    return np.maximum(exponents, 2).astype(np.uint64)


def _feistel(values: np.ndarray, num_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2**num_bits), uint64 [n] all. The halves differ by a bit when `num_bits` is odd and swap each round."""
    one = np.uint64(1)
    right_bits = num_bits >> one
    masks = (one << (num_bits - right_bits)) - one, (one << right_bits) - one  # of the left half, of the right one
    left, right = values >> right_bits, values & masks[1]
    scratch = np.empty_like(values)
    with np.errstate(over="ignore"):
        for number in range(_NUM_ROUNDS):
            mixed = keys + np.uint64((number + 1) * _GOLDEN & _MASK)
            mixed += right
            _mix_in_place(mixed, scratch)
            mixed ^= keys
            _mix_in_place(mixed, scratch)
            mixed &= masks[number % 2]
            mixed ^= left
            left, right = right, mixed
    # An even number of rounds: the halves have their first sizes again.
    return (left << right_bits) | right
