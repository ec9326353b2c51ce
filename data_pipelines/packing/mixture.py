"""How the positions of the shuffled mixture are distributed over its sources."""

from __future__ import annotations

from collections.abc import Sequence


class Mixture:
    """How many of the first n positions belong to each source: integers that never decrease with n and sum to n.

    One after another, each source takes its share of what is left, rounded down. In one epoch without weights every
    source gets exactly its size; with weights every source is within a few samples of its share, at any n. If only some
    sources have a weight, the rest share what those leave of 1 in proportion to their sizes.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None] = ()):
        given = [weight for weight in weights if weight is not None]
        if not given:
            self._shares = [int(size) for size in sizes]
            return
        unweighted = sum(size for size, weight in zip(sizes, weights) if weight is None)
        whole = sum(given) if len(given) == len(weights) or not unweighted else 1.0
        left = max(whole - sum(given), 0.0)
        self._shares = [
            max(1, round(weight / whole * 2**32)) if weight is not None
            else round(left / whole * size / max(unweighted, 1) * 2**32)
            for size, weight in zip(sizes, weights)
        ]  # fmt: skip

    def counts(self, n: int) -> list[int]:
        left, shares, result = n, sum(self._shares), []
        for share in self._shares:
            taken = left * share // shares if shares else 0
            result.append(taken)
            left, shares = left - taken, shares - share
        return result
