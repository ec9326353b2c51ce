"""RefCOCO: whether the box in an answer matches the right one (intersection over union of at least 0.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mono_jax.evaluation.metrics.metric import Answered

THRESHOLD = 0.5
SCALE = 1000  # of the coordinates in <box>[[x1, y1, x2, y2]]</box>
Box = tuple[float, float, float, float]
_FOUR = re.compile(r"\[([^][,\n]*),([^][,\n]*),([^][,\n]*),([^][,\n]*)\]")


def box_of(answer: str, width: float, height: float) -> Box | None:
    """The first box of an answer in pixels: x1, y1, x2, y2 of 0 to 1000, or of 0 to 1 if they add up to less than 4.

    InternVL's pattern begins at the first "[" of an answer, whatever follows; here that need not be the box.
    """
    if (found := next(filter(None, map(_numbers, _FOUR.findall(answer))), None)) is None:
        return None
    x1, y1, x2, y2 = found
    scale = SCALE if x1 + y1 + x2 + y2 >= 4 else 1
    return x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def text_of(box: Sequence[float], width: float, height: float) -> str:
    """How a model writes a box given in pixels as x1, y1, x2, y2."""
    shares = (edge / of * SCALE for edge, of in zip(box, (width, height, width, height)))
    return f"<box>[[{', '.join(str(round(share)) for share in shares)}]]</box>"


def intersection_over_union(first: Box, second: Box) -> float:
    """0 for boxes without area, and for numbers that are not finite."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    both = max(0.0, right - left) * max(0.0, bottom - top)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    result = both / (area - both) if area != both else 0.0
    return result if math.isfinite(result) else 0.0


def grounded(example: Answered) -> float:
    """1 if the boxes match. Fields: "bbox" (x1, y1, x2, y2 in pixels), "width", "height" of the image."""
    given = box_of(example.answer, float(example.field("width")), float(example.field("height")))
    right = tuple(map(float, example.field("bbox")))
    return float(given is not None and intersection_over_union(given, right) >= THRESHOLD)
