"""Two-dimensional packing: samples of (visual, text) tokens into rows of V visual and T text slots."""

from __future__ import annotations

import math

import numpy as np


def pack(visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int) -> np.ndarray:
    """Packs samples into few rows.

    All rows are filled at once, in rounds: samples come in decreasing size, and each round gives the next ones to the
    rows with the most room, the largest to the emptiest. Rows thus become alike in both kinds of token. Several
    starting numbers of rows are tried.

    Args:
      visual, text: int [n], tokens of each sample; none exceeds the slots of a row.
      visual_slots, text_slots: V and T.

    Returns:
      int32 [n]: the row of each sample. Rows are 0 .. max, none is empty. A pure function of the arguments.
    """
    if not len(visual):
        return np.zeros(0, np.int32)
    visual, text = np.asarray(visual, np.int64), np.asarray(text, np.int64)
    attempts = [_rounds(visual, text, visual_slots, text_slots, slack) for slack in (1.0, 1.01, 1.02)]
    return min(attempts, key=lambda rows: int(rows.max()))


def least_rows(visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int) -> int:
    """No packing has fewer rows than this."""
    fullest = [int(np.sum(text)) / text_slots] + ([int(np.sum(visual)) / visual_slots] if visual_slots else [])
    return math.ceil(max(fullest))


def _rounds(visual: np.ndarray, text: np.ndarray, visual_slots: int, text_slots: int, slack: float) -> np.ndarray:
    rows = np.full(len(visual), -1, np.int32)
    visual_room, text_room = np.zeros(0, np.int64), np.zeros(0, np.int64)
    left = np.lexsort((-text, -visual))
    while len(left):
        new = math.ceil(least_rows(visual[left], text[left], visual_slots, text_slots) * slack)
        visual_room = np.concatenate([visual_room, np.full(new, visual_slots)])
        text_room = np.concatenate([text_room, np.full(new, text_slots)])
        placed = True
        while placed and len(left):
            refused = []
            for start in range(0, len(left), len(visual_room)):
                samples = left[start : start + len(visual_room)]
                emptiest = np.lexsort((-text_room, -visual_room))[: len(samples)]
                fits = (visual[samples] <= visual_room[emptiest]) & (text[samples] <= text_room[emptiest])
                chosen, into = samples[fits], emptiest[fits]
                rows[chosen] = into
                visual_room[into] -= visual[chosen]
                text_room[into] -= text[chosen]
                refused.append(samples[~fits])
            still = np.concatenate(refused)
            placed, left = len(still) < len(left), still
        slack = 1.0
    return np.unique(rows, return_inverse=True)[1].astype(np.int32)
