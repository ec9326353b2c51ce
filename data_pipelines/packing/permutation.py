"""Seeded permutations with random access, and the 64-bit hashes that they are built from (grain's have 32 bits)."""

from __future__ import annotations

import math

import numpy as np

_MASK = 2**64 - 1


def mix(values: np.ndarray | int, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of each value under a key (the splitmix64 finaliser): uint64, same shape."""
    x = np.asarray(values, np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*numbers: int) -> int:
    """One 64-bit key from several numbers, the order of which matters."""
    key = 0
    for number in numbers:
        key = int(mix(np.array([(number ^ key) & _MASK], np.uint64), key)[0])
    return key


class Permutation:
    """A seeded permutation of range(n), any part of which can be computed independently, without memory.

    A Feistel network on the digits (left, right) of a number in a mixed radix, left < a, right < b, a * b >= n: in
    turn, one digit is shifted by a hash of the other, modulo its radix. This is invertible, hence a bijection. The few
    results that are not below n are passed through the network again until they are.
    """

    ROUNDS = 8

    def __init__(self, n: int, key: int):
        self.n = n
        self._left = max(1, math.isqrt(n))
        self._right = max(1, -(-n // self._left))
        self._keys = [fold(key, number) for number in range(self.ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [k] positions in range(n) -> int64 [k]."""
        result = self._once(np.asarray(positions, np.uint64))
        while len(outside := np.flatnonzero(result >= self.n)):
            result[outside] = self._once(result[outside])
        return result.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        radix = (np.uint64(self._left), np.uint64(self._right))
        digits = list(np.divmod(values, radix[1]))
        for number, key in enumerate(self._keys):
            moved, by = number % 2, digits[1 - number % 2]
            digits[moved] = (digits[moved] + mix(by, key) % radix[moved]) % radix[moved]
        return digits[0] * radix[1] + digits[1]


class LocalPermutation:
    """A permutation of range(n) that draws from few neighbourhoods at a time: remote shards are read in long runs.

    range(n) is cut into runs of ``run_length`` neighbours and the runs are shuffled; then ``runs`` of them at a time
    are joined and shuffled. What is left after the last whole group forms a separate group and comes last.
    """

    def __init__(self, n: int, key: int, runs: int, run_length: int):
        self.n, self.key, self._run_length = n, key, run_length
        self._group = runs * run_length
        self._whole = n // self._group * self._group
        self._runs = Permutation(self._whole // run_length, fold(key, 1))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [k] positions in range(n) -> int64 [k]."""
        positions = np.asarray(positions, np.int64)
        groups = positions // self._group
        result = np.empty_like(positions)
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            start = group * self._group
            size = min(self._group, self.n - start)
            inside = start + Permutation(size, fold(self.key, 2, group))(positions[at] - start)
            if start < self._whole:
                inside = self._runs(inside // self._run_length) * self._run_length + inside % self._run_length
            result[at] = inside
        return result
