"""crc32 of a concatenation from the crc32 of its parts, so that blocks written in any order make a file's checksum."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of crc32, lowest power in the highest bit
_ONE = 1 << 31


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo the crc's polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x to the power of 8 * num_bytes: what appending that many bytes multiplies a crc by."""
    result, power, exponent = _ONE, _ONE >> 1, 8 * num_bytes
    while exponent:
        if exponent & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        exponent >>= 1
    return result


def join_crc32(first: int, second: int, second_bytes: int) -> int:
    """crc32 of A + B from those of A and of B."""
    return _multiply(_shift(second_bytes), first) ^ second if second_bytes else first
