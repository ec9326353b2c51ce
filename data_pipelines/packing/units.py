"""The units of a source: samples, or the pieces that plain text is cut into."""

from __future__ import annotations

import numpy as np

from data_pipelines.packing.lengths import Lengths


class Units:
    """The units of one source and their lengths."""

    def __init__(self, lengths: Lengths, longest_piece: int, begin: int):
        """Args:
        longest_piece: maximum tokens of a piece of plain text, including the ``begin`` tokens put in front of each.
        """
        self.lengths, self._longest, self._begin = lengths, longest_piece, begin
        self.count = len(lengths.counts)
        self._ends: np.ndarray | None = None
        if lengths.plain:
            plain = np.maximum(-lengths.counts[:, 1].astype(np.int64), 0)
            self._ends = np.cumsum(np.maximum(1, -(-plain // (longest_piece - begin))))
            self.count = int(self._ends[-1])

    def get(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64 [k] units -> sample int64, piece int64, visual int64 (below 0: bad), text int64; all [k]."""
        if self._ends is None:
            counts = self.lengths.counts[units].astype(np.int64)
            return units, np.zeros_like(units), counts[:, 0], counts[:, 1]
        samples = np.searchsorted(self._ends, units, side="right")
        starts = np.where(samples > 0, self._ends[samples - 1], 0)
        pieces = units - starts
        counts = self.lengths.counts[samples].astype(np.int64)
        room = self._longest - self._begin
        cut = np.minimum(-counts[:, 1] - pieces * room, room) + self._begin
        return samples, pieces, counts[:, 0], np.where(counts[:, 1] < 0, cut, counts[:, 1])

    def number(self, samples: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """The units of these pieces of samples, the inverse of ``get``: int64 [k]."""
        if self._ends is None:
            return np.asarray(samples, np.int64)
        return np.where(samples > 0, self._ends[samples - 1], 0) + pieces
