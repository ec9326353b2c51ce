"""Which V and T suit a mixture, determined by packing a sample of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.packing.pack import STYLES, least_rows, pack

GOAL = (0.975, 0.91)  # visual and text occupancy: 97 and 90 %, with a margin for blocks that were not tried
DROPPED = 0.002  # acceptable share of samples that are too long for a row
_TEXT_FACTORS = (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)  # T relative to the mean requirement
_STYLES = STYLES[::4]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """One choice of V and T and the results on the sample.

    Attributes:
      visual_tokens, text_tokens: V and T.
      visual_occupancy, text_occupancy: share of the slots that hold tokens.
      occupancy: the same for all slots.
      bound: upper bound on the occupancy of all slots for any packing with this V and T.
      dropped: share of the samples that are too long for a row.
      samples_per_row: mean.
    """

    visual_tokens: int
    text_tokens: int
    visual_occupancy: float
    text_occupancy: float
    occupancy: float
    bound: float
    dropped: float
    samples_per_row: float

    @property
    def merit(self) -> tuple[float, ...]:
        """Larger is better: few samples dropped, then both goals reached (or nearly), then all slots well used."""
        nearest = min(
            self.visual_occupancy / GOAL[0] if self.visual_tokens else 1.0, self.text_occupancy / GOAL[1], 1.0
        )
        return -max(self.dropped, DROPPED), nearest, self.occupancy


def try_capacity(visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int) -> Capacity:
    """Packs samples of these lengths (int [n]) into rows of V and T slots."""
    fits = (visual <= visual_slots) & (text <= text_slots)
    v, t = visual[fits], text[fits]
    if not len(v):
        return Capacity(visual_slots, text_slots, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    rows = int(pack(v, t, visual_slots, text_slots, _STYLES).max()) + 1
    tokens, slots = int(v.sum() + t.sum()), visual_slots + text_slots
    return Capacity(
        visual_slots,
        text_slots,
        float(v.sum() / (rows * visual_slots)) if visual_slots else 0.0,
        float(t.sum() / (rows * text_slots)),
        tokens / (rows * slots),
        tokens / (least_rows(v, t, visual_slots, text_slots) * slots),
        1 - len(v) / len(visual),
        len(v) / rows,
    )


def suggest(visual: np.ndarray, text: np.ndarray, slots: int, unit: int, row_multiple: int = 1) -> Sequence[Capacity]:
    """Choices of V and T with V + T <= ``slots``, the best first.

    Args:
      visual, text: int [n], tokens of a random sample of the mixture (about 10,000).
      slots: the longest row wanted.
      unit: visual tokens of a tile; V is a multiple of it.
      row_multiple: V + T is a multiple of it, since attention kernels work on whole blocks.
    """
    unit_text = 64 if slots >= 4096 else 16
    if not visual.any():
        unit_text = np.lcm(unit_text, row_multiple)
        choices = {(0, slots // unit_text * unit_text)}
    else:
        ratio = text.sum() / visual.sum()
        largest = int(slots / (1 + ratio * _TEXT_FACTORS[0])) // unit * unit
        sizes = {int(largest * share) // unit * unit for share in np.linspace(0.5, 1, 9)}
        choices = {
            (size, -(-int(size * ratio * factor) // unit_text) * unit_text)
            for size in sizes
            for factor in _TEXT_FACTORS
        }
        # The text slots fill up to the next whole multiple or, one multiple lower, take what remains.
        totals = {
            (v, -(-(v + t) // row_multiple) * row_multiple - less) for v, t in choices for less in (0, row_multiple)
        }
        choices = choices if row_multiple == 1 else {(v, total - v) for v, total in totals if total > v}
        least = np.quantile(visual, 1 - DROPPED)
        choices = {(v, t) for v, t in choices if v >= least}
    tried = [try_capacity(visual, text, v, t) for v, t in sorted(choices) if t and v + t <= slots]
    return sorted(tried, key=lambda capacity: capacity.merit, reverse=True)
