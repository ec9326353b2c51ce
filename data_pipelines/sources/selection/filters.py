"""Metadata filters for noisy pairs, which need only the indices; each counts what it drops.

A sample without the score that a filter needs is dropped by it: an unknown value does not pass.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.records.scripts import SCRIPTS
from data_pipelines.sources.indices.shard_index import SCORES, ShardIndex

Columns = Mapping[str, np.ndarray]

# Option -> (reason under which it is counted, column, whether the option is the minimum value allowed).
_BOUNDS: dict[str, tuple[str, str, bool]] = {
    "min_size": ("too_small", "short_side", True),
    "max_size": ("too_big", "long_side", False),
    "max_aspect_ratio": ("aspect_ratio", "aspect_ratio", False),
    "min_caption_chars": ("caption_too_short", "text_chars", True),
    "max_caption_chars": ("caption_too_long", "text_chars", False),
}
_OTHERS = ("scripts", "unique_captions", "unique_images")


def _bounds(scores: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """``_BOUNDS`` plus the bounds of the indices' scores and of joined scores."""
    of_scores = {f"{end}_{name}": (name, name, end == "min") for name in (*SCORES, *scores) for end in ("min", "max")}
    return of_scores | _BOUNDS


def check_filters(options: Mapping[str, Any], what: str, scores: Sequence[str] = ()) -> None:
    """Raises DataError on an unknown filter or a value of the wrong kind.

    Options: min_size (shorter side, pixels), max_size (longer side), max_aspect_ratio (longer / shorter),
    min_NAME and max_NAME of each score (``SCORES``, and joined ones: ``scores``), min_caption_chars, max_caption_chars:
    the bounds themselves are allowed, "N%" is the value that N % of the source's usable samples do not exceed; scripts
    (list of writing systems), unique_captions, unique_images (booleans: the first of equal samples is kept).
    """
    bounds = _bounds(scores)
    check_keys(options, (*bounds, *_OTHERS), f"{what}: filters")
    for name in bounds.keys() & options.keys():
        value = options[name]
        is_number = isinstance(value, int | float | None) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, str) and _percent(value) is not None):
            raise DataError(f'{what}: filter {name} must be a number or a share, "0%" to "100%", got {value!r}')
    for script in options.get("scripts") or ():
        if script not in SCRIPTS:
            raise DataError(f"{what}: filter scripts: unknown script {script!r}; {did_you_mean(script, SCRIPTS)}")
    for name in ("unique_captions", "unique_images"):
        if not isinstance(options.get(name, False), bool | None):
            raise DataError(f"{what}: filter {name} must be true or false, got {options[name]!r}")


def _percent(text: str) -> float | None:
    """The share in "N%", 0 to 1; None if ``text`` is not a share."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    return float(found[1]) / 100 if found and float(found[1]) <= 100 else None


class Filters:
    """Checked options; ``dropped`` counts what they have dropped so far. Raises DataError like ``check_filters``.

    ``scores``: names of joined scores.
    """

    def __init__(self, options: Mapping[str, Any] | None, what: str = "source", scores: Sequence[str] = ()):
        off = lambda value: value is None or value is False or value == ()  # noqa: E731 (0 is a bound)
        self.options = {name: value for name, value in (options or {}).items() if not off(value)}
        check_filters(self.options, what, scores)
        self._joined, bounds = tuple(scores), _bounds(scores)
        self._bounds = {option: bounds[option] for option in bounds if option in self.options}
        self._values = {option: self.options[option] for option in self._bounds}
        self.dropped: Counter[str] = Counter()

    @property
    def wants_unique(self) -> bool:
        return bool({"unique_captions", "unique_images"} & self.options.keys())

    @property
    def shared(self) -> set[str]:
        """Columns whose values are needed for all samples, since a bound is a share of the samples."""
        return {self._bounds[option][1] for option, value in self._values.items() if isinstance(value, str)}

    def settle(self, columns: Columns) -> None:
        """Turns shares into values; ``columns``: those in ``shared``, of all usable samples, NaN = not known."""
        for option, value in self._values.items():
            if isinstance(value, str):
                known = columns[self._bounds[option][1]]
                known = known[~np.isnan(known)]
                self._values[option] = float(np.quantile(known, _percent(value))) if len(known) else math.nan

    def uncounted(self) -> Filters:
        """The same filters with the same settled values, but with separate counts."""
        trial = copy.copy(self)
        trial.dropped = Counter()
        return trial

    def keep(self, columns: Columns, with_image: np.ndarray) -> np.ndarray:
        """bool [k]: which of k samples pass all filters except those on duplicates.

        Args:
          columns: see ``select.columns``.
          with_image: bool [k], whether a sample has an image.
        """
        alive = np.ones(len(with_image), bool)
        for option, (reason, column, is_minimum) in self._bounds.items():
            values, bound = columns[column], np.float32(self._values[option])
            passes = values >= bound if is_minimum else values <= bound  # NaN passes neither
            # Conditions on images or pairs do not apply to samples without an image.
            of_all = column == "text_chars" or column in self._joined
            alive = self._drop(reason, alive, passes if of_all else passes | ~with_image)
        if "scripts" in self.options:
            wanted = [SCRIPTS.index(script) for script in self.options["scripts"]]
            alive = self._drop("script", alive, np.isin(columns["script"], wanted))
        return alive

    def unique(self, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
        """bool [n]: the first samples with their caption and image, by the content hashes of all samples in order."""
        alive = np.ones(len(captions), bool)
        if "unique_captions" in self.options:
            alive = self._drop("duplicate_caption", alive, _first_of_equals(captions, alive))
        if "unique_images" in self.options:
            alive = self._drop("duplicate_image", alive, _first_of_equals(images, alive))
        return alive

    def _drop(self, reason: str, alive: np.ndarray, passes: np.ndarray) -> np.ndarray:
        if lost := int(np.count_nonzero(alive & ~passes)):
            self.dropped[reason] += lost
        return alive & passes


def shapes(index: ShardIndex, rows: np.ndarray) -> dict[str, np.ndarray]:
    """float32 [k] each: shortest and longest side and greatest aspect ratio among the images of each sample."""
    counts = index.columns["image_count"].astype(np.int64)
    sizes = index.columns["image_size"].astype(np.float32)
    short, long = (sizes.min(1), sizes.max(1)) if len(sizes) else (sizes[:, 0], sizes[:, 0])
    with_image = np.flatnonzero(counts)
    starts = (np.cumsum(counts) - counts)[with_image]
    result = {}
    for name, values, reduce in (
        ("short_side", short, np.minimum),
        ("long_side", long, np.maximum),
        ("aspect_ratio", long / short, np.maximum),
    ):
        column = np.full(len(counts), np.nan, np.float32)
        if len(with_image):
            column[with_image] = reduce.reduceat(values, starts)
        result[name] = column[rows]
    return result


def _first_of_equals(hashes: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """bool [n]: false if an earlier alive sample has the same hash; hash 0 (no content) never counts."""
    considered = np.flatnonzero(alive & (hashes != 0))
    _, first = np.unique(hashes[considered], return_index=True)
    result = np.ones(len(hashes), bool)
    result[considered] = False
    result[considered[first]] = True
    return result
