"""Permutations of range(n) that need no memory: a keyed Feistel network with cycle walking."""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spaces the inputs of the mixing function
_MASK = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key of the parts, the same on every machine and in every version of Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit reaches every output bit. uint64 in and out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_keys(base_key: int, epochs: np.ndarray) -> np.ndarray:
    """One key for each epoch, uint64 [n] from int [n]."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(base_key) + (epochs.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


def permute(indices: np.ndarray, size: int, keys: np.ndarray | int) -> np.ndarray:
    """Where each index goes in the permutation of range(size) that its key selects.

    indices: int [n], each in [0, size). keys: one 64-bit key, or uint64 [n]. Returns int64 [n].
    """
    values = np.asarray(indices).astype(np.uint64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), values.shape)
    if size <= 1:
        return values.astype(np.int64)
    num_bits = max(2, (size - 1).bit_length())
    outside = np.ones(values.shape, bool)
    # The network permutes [0, 2**num_bits), at most twice `size` here but for the tiniest sizes. Values that land
    # outside are sent through again until they come back: still a permutation.
    while outside.any():
        values[outside] = _feistel(values[outside], num_bits, keys[outside])
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, num_bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2**num_bits). The halves differ by a bit when `num_bits` is odd and swap each round."""
    right_bits = num_bits // 2
    left_bits = num_bits - right_bits
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    with np.errstate(over="ignore"):
        for number in range(1, _NUM_ROUNDS + 1):
            round_keys = keys + np.uint64(number * _GOLDEN & _MASK)
            mask = np.uint64((1 << left_bits) - 1)
            left, right = right, left ^ (_mix(_mix(right + round_keys) ^ keys) & mask)
            left_bits, right_bits = right_bits, left_bits
    # An even number of rounds: the halves have their first sizes again.
    return (left << np.uint64(right_bits)) | right
