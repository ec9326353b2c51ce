"""Batches whose images are replaced: the loss this costs a model measures how much it uses the images.

A model that has learnt to caption well may still ignore the image and give the most common text. Its loss is then the
same with another sample's images, or noise. Text, order and weights stay unchanged.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from data_pipelines.batch import Batch, boundaries

Blindness = Literal["noise", "other"]


def blinded(batch: Mapping[str, np.ndarray], blindness: Blindness) -> Batch:
    """The batch with other pixels, a function of each row only.

    Args:
      blindness: "noise" = uniform random bytes; "other" = each sample gets the images of the next one in its row that
        has any, repeated or cut to its own number of tiles. If it is the only such sample of a row, it gets noise.
    """
    patches = batch["patches"].copy()
    for row, (order, segments, end) in enumerate(zip(batch["order"], batch["segments"], boundaries(batch))):
        visual = (order < end) & (segments > 0)
        slots, samples = order[visual], segments[visual]
        images = [slots[samples == sample] for sample in dict.fromkeys(samples.tolist())]
        if blindness == "other" and len(images) > 1:
            for own, others in zip(images, images[1:] + images[:1]):
                patches[row, own] = batch["patches"][row, np.resize(others, len(own))]
        elif images:
            patches[row, slots] = _noise(batch, row, (len(slots), *patches.shape[2:]))
    return {**batch, "patches": patches}


def _noise(batch: Mapping[str, Any], row: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise that does not depend on which process builds the row, or on its place in the batch."""
    seed = zlib.crc32(np.ascontiguousarray(batch["tokens"][row]).tobytes())
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
