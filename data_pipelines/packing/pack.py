"""Two-dimensional packing: samples of (visual, text) tokens into rows of V visual and T text slots.

Everything is vectorised over many rows and samples in NumPy, so that millions of samples are packed per second.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Style:
    """How rows are filled.

    Attributes:
      slack: rows opened at the start, relative to the minimum number that could suffice.
      spread: share of the visual tokens (of the largest samples) that is dealt out evenly; the rest fills gaps.
      heavy: samples with more than this share of a row's text slots are dealt out first.
    """

    slack: float
    spread: float
    heavy: float


_SLACKS, _SPREADS, _HEAVIES = (1.0, 1.01, 1.03), (1.0, 0.85, 0.7, 0.6, 0.5, 0.3), (2.0, 0.4, 0.3, 0.2, 0.15)
STYLES = tuple(itertools.starmap(Style, itertools.product(_SLACKS, _SPREADS, _HEAVIES)))


def pack(
    visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int, styles: Sequence[Style] = STYLES
) -> np.ndarray:
    """Packs samples into few rows.

    Rows are filled in three ways, one after another. Samples with much text, and then the largest images, are *dealt
    out*: in each round every row gets one sample, the largest going to the emptiest row, which balances both kinds of
    token across rows. Smaller images *fill gaps*: each goes to the tightest row that can take it. Text without images
    is dealt out into what is left. For samples that found no place, rows with visual room *exchange* text: a sample
    with much text is swapped with one of equal visual size in a row whose visual slots are full. What is left opens new
    rows.

    Args:
      visual, text: int [n], tokens of each sample; none exceeds the slots of a row.
      visual_slots, text_slots: V and T.
      styles: the styles to try; the one with the fewest rows wins, the first in case of a tie.

    Returns:
      int32 [n]: the row of each sample. Rows are 0 .. max, and none is empty. A pure function of the arguments.
    """
    if not len(visual):
        return np.zeros(0, np.int32)
    packings = (_Packing(visual, text, visual_slots, text_slots, style).rows for style in styles)
    rows = min(packings, key=lambda rows: int(rows.max()))
    return np.unique(rows, return_inverse=True)[1].astype(np.int32)


def best_styles(
    visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int, count: int = 2
) -> tuple[Style, ...]:
    """The styles that suit such samples best, so that similar samples need not be tried with all styles."""
    tried = {s: int(pack(visual, text, visual_slots, text_slots, [s]).max(initial=0)) for s in STYLES}
    return tuple(sorted(STYLES, key=lambda style: tried[style])[:count])


def least_rows(visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int) -> int:
    """A lower bound on the number of rows of any packing."""
    needed = [int(np.sum(text)) / text_slots] + ([int(np.sum(visual)) / visual_slots] if visual_slots else [])
    return math.ceil(max(needed))


class _Packing:
    """One packing in progress. ``rows`` is the result; sample indices are kept in decreasing size, visual first."""

    WORTH = 0.05  # share of the samples that must have been placed for another attempt
    EXCHANGES = 4  # attempts at evening out text before rows are added

    def __init__(self, visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int, style: Style):
        self.visual, self.text = np.asarray(visual, np.int64), np.asarray(text, np.int64)
        self.slots = visual_slots, text_slots
        self.rows = np.full(len(visual), -1, np.int32)
        self.visual_room, self.text_room = np.zeros(0, np.int64), np.zeros(0, np.int64)
        order = np.lexsort((-self.text, -self.visual))
        self._open(math.ceil(self._least(order) * style.slack))

        is_heavy = self.text[order] > style.heavy * text_slots
        heavy, light = order[is_heavy], order[~is_heavy]
        images, words = light[self.visual[light] > 0], light[self.visual[light] == 0]
        spread = np.searchsorted(np.cumsum(self.visual[images]), style.spread * self.visual[images].sum())
        left = [
            self._deal(heavy[np.argsort(-self.text[heavy], kind="stable")], by_text=True),
            self._deal(images[:spread], by_text=False),
            self._fill_gaps(images[spread:]),
            self._deal(words, by_text=True),
        ]
        self._place_rest(np.concatenate(left))

    def _least(self, samples: np.ndarray) -> int:
        return max(1, least_rows(self.visual[samples], self.text[samples], *self.slots))

    def _open(self, rows: int) -> None:
        self.visual_room = np.concatenate([self.visual_room, np.full(rows, self.slots[0])])
        self.text_room = np.concatenate([self.text_room, np.full(rows, self.slots[1])])

    def _put(self, samples: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Puts each sample into its row (all rows differ); returns those that do not fit."""
        fits = (self.visual[samples] <= self.visual_room[rows]) & (self.text[samples] <= self.text_room[rows])
        placed, into = samples[fits], rows[fits]
        self.rows[placed] = into
        self.visual_room[into] -= self.visual[placed]
        self.text_room[into] -= self.text[placed]
        return samples[~fits]

    def _deal(self, samples: np.ndarray, by_text: bool) -> np.ndarray:
        """Rounds in which each row gets one sample, the emptiest row the largest; returns those that did not fit."""
        left = [samples[:0]]
        for start in range(0, len(samples), len(self.visual_room)):
            some = samples[start : start + len(self.visual_room)]
            keys = (-self.visual_room, -self.text_room) if by_text else (-self.text_room, -self.visual_room)
            left.append(self._put(some, np.lexsort(keys)[: len(some)]))
        return np.concatenate(left)

    def _fill_gaps(self, samples: np.ndarray) -> np.ndarray:
        """Size by size, samples go to the tightest rows that can take them; returns those that found none."""
        left = [samples[:0]]
        sizes, starts = np.unique(-self.visual[samples], return_index=True)
        for size, some in zip(-sizes, np.split(samples, starts[1:])):
            while len(some):
                before = len(some)
                rows = np.flatnonzero((self.visual_room >= size) & (self.text_room >= self.text[some[-1]]))
                tightest = rows[np.lexsort((-self.text_room[rows], self.visual_room[rows]))][:before]
                roomiest_first = tightest[np.argsort(-self.text_room[tightest], kind="stable")]
                most_text, others = some[: len(tightest)], some[len(tightest) :]
                some = np.concatenate([self._put(most_text, roomiest_first), others])
                if len(some) == before:  # the rows with the most room lack text slots: take the least text first
                    least_text = some[::-1][: len(tightest)]
                    refused = self._put(least_text, roomiest_first[::-1])
                    some = np.concatenate([some[: before - len(least_text)], refused[::-1]])
                if before - len(some) <= self.WORTH * before:
                    break
            left.append(some)
        return np.concatenate(left)

    def _place_rest(self, left: np.ndarray) -> None:
        exchanges = 0
        while len(left):
            before = len(left)
            left = self._fill_gaps(left[np.lexsort((-self.text[left], -self.visual[left]))])
            if len(left) and before - len(left) <= self.WORTH * before:
                if exchanges < self.EXCHANGES:
                    self._even_out(left)
                else:
                    self._open(self._least(left))
                exchanges += 1

    def _even_out(self, left: np.ndarray) -> None:
        """Makes room for the text of ``left`` in rows that have visual room: full rows take some of their text."""
        has_room = self.visual_room >= self.visual[left].min()
        lacks_text = has_room & (self.text_room < np.quantile(self.text[left], 0.75))
        placed = np.flatnonzero(self.rows >= 0)
        giving, taking = placed[lacks_text[self.rows[placed]]], placed[~has_room[self.rows[placed]]]
        for size in np.unique(self.visual[giving])[::-1]:
            self._exchange(giving[self.visual[giving] == size], taking[self.visual[taking] == size])

    def _exchange(self, giving: np.ndarray, taking: np.ndarray) -> None:
        """Swaps samples of equal visual size, one per row: those of ``giving`` for samples with less text."""
        taking = self._first_of_row(taking, self.text)
        takes = self.text_room[self.rows[taking]] + self.text[taking]  # the most text that would fit there instead
        order = np.argsort(-takes, kind="stable")
        giving = self._first_of_row(giving[self.text[giving] <= takes.max(initial=0)], -self.text)
        giving = giving[np.argsort(-self.text[giving], kind="stable")]
        pairs = min(len(giving), len(taking))
        giving, taking, takes = giving[:pairs], taking[order[:pairs]], takes[order[:pairs]]
        good = (self.text[taking] < self.text[giving]) & (self.text[giving] <= takes)
        giving, taking = giving[good], taking[good]
        gain = self.text[giving] - self.text[taking]
        self.text_room[self.rows[giving]] += gain
        self.text_room[self.rows[taking]] -= gain
        self.rows[giving], self.rows[taking] = self.rows[taking], self.rows[giving]

    def _first_of_row(self, samples: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The sample with the smallest key in each row."""
        samples = samples[np.lexsort((key[samples], self.rows[samples]))]
        return samples[np.unique(self.rows[samples], return_index=True)[1]]
