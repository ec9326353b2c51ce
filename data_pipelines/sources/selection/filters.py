"""Metadata filters for noisy pairs, decided from the indices only; each counts what it drops.

A sample without the score that a filter needs is dropped by it: an unknown value is not a good one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.records.scripts import SCRIPTS
from data_pipelines.sources.indices.shard_index import SCORES, ShardIndex

Columns = Mapping[str, np.ndarray]

# Option -> (what it is counted under, column, whether the option is the least value allowed).
_BOUNDS: dict[str, tuple[str, str, bool]] = {
    "min_size": ("too_small", "short_side", True),
    "max_size": ("too_big", "long_side", False),
    "max_aspect_ratio": ("aspect_ratio", "aspect_ratio", False),
    "min_similarity": ("similarity", "similarity", True),
    "max_punsafe": ("punsafe", "punsafe", False),
    "max_pwatermark": ("pwatermark", "pwatermark", False),
    "min_aesthetic": ("aesthetic", "aesthetic", True),
    "min_caption_chars": ("caption_too_short", "text_chars", True),
    "max_caption_chars": ("caption_too_long", "text_chars", False),
}
OPTIONS = (*_BOUNDS, "scripts", "unique_captions", "unique_images")


def check_filters(options: Mapping[str, Any], what: str) -> None:
    """Raises DataError on an unknown filter or a value of the wrong kind.

    Options: min_size (shorter side, pixels), max_size (longer side), max_aspect_ratio (longer / shorter),
    min_similarity, max_punsafe, max_pwatermark, min_aesthetic, min_caption_chars, max_caption_chars (bounds are allowed
    values), scripts (list of writing systems), unique_captions, unique_images (booleans: the first of equals is kept).
    """
    check_keys(options, OPTIONS, f"{what}: filters")
    for name in _BOUNDS.keys() & options.keys():
        if isinstance(options[name], bool) or not isinstance(options[name], int | float | None):
            raise DataError(f"{what}: filter {name} must be a number, is {options[name]!r}")
    for script in options.get("scripts") or ():
        if script not in SCRIPTS:
            raise DataError(f"{what}: filter scripts: unknown script {script!r}; {did_you_mean(script, SCRIPTS)}")
    for name in ("unique_captions", "unique_images"):
        if not isinstance(options.get(name, False), bool | None):
            raise DataError(f"{what}: filter {name} must be true or false, is {options[name]!r}")


class Filters:
    """Checked options; ``dropped`` counts what they have dropped so far. Raises DataError like ``check_filters``."""

    def __init__(self, options: Mapping[str, Any] | None, what: str = "source"):
        self.options = {k: v for k, v in (options or {}).items() if v not in (None, False, ())}
        check_filters(self.options, what)
        self.dropped: Counter[str] = Counter()

    @property
    def wants_unique(self) -> bool:
        return bool({"unique_captions", "unique_images"} & self.options.keys())

    def keep(self, index: ShardIndex, rows: np.ndarray, text: Columns) -> np.ndarray:
        """bool [k]: which of a shard's ``rows`` pass all filters but those on duplicates.

        Args:
          index: of the shard.
          rows: int64 [k].
          text: columns text_chars and script of the rows (of the joined captions where there are any).
        """
        columns = {name: index.columns[name][rows] for name in SCORES} | shapes(index, rows) | text
        with_image = index.columns["image_count"][rows] > 0
        alive = np.ones(len(rows), bool)
        for option, (reason, column, is_minimum) in _BOUNDS.items():
            if option in self.options:
                values, bound = columns[column], np.float32(self.options[option])
                passes = values >= bound if is_minimum else values <= bound  # NaN passes neither
                # Conditions on images or pairs do not apply to samples without an image.
                alive = self._drop(reason, alive, passes if column == "text_chars" else passes | ~with_image)
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
    """bool [n]: false where an earlier alive sample has the same hash; hash 0 (nothing there) never counts."""
    considered = np.flatnonzero(alive & (hashes != 0))
    _, first = np.unique(hashes[considered], return_index=True)
    result = np.ones(len(hashes), bool)
    result[considered] = False
    result[considered[first]] = True
    return result
