"""How the positions of the shuffled mixture are shared among its sources."""

from __future__ import annotations

from collections.abc import Sequence


class Mixture:
    """How many of the first n positions belong to each source: whole numbers that only grow with n, and sum to n.

    Source after source takes its share of what is left, rounded down. In one epoch without weights every source gets
    exactly its size; with weights every source is within a few samples of its share, at any n.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None):
        if weights is None:
            self._shares = [int(size) for size in sizes]
        else:
            self._shares = [max(1, round(weight / sum(weights) * 2**32)) for weight in weights]

    def counts(self, n: int) -> list[int]:
        left, shares, result = n, sum(self._shares), []
        for share in self._shares:
            taken = left * share // shares if shares else 0
            result.append(taken)
            left, shares = left - taken, shares - share
        return result
