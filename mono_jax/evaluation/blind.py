"""Batches whose images are taken away: what a model loses by it is what it sees.

A model that has learnt to caption well may still be blind to the image and say what is commonest. Its loss is then the
same when each image is another's, or noise. Text, order and weights stay as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from data_pipelines.batch import Batch, boundaries

Blindness = Literal["noise", "other"]


def blinded(batch: Mapping[str, np.ndarray], blindness: Blindness) -> Batch:
    """The batch with other pixels, a function of each row alone.

    Args:
      blindness: "noise" = uniform bytes; "other" = each sample has the images of the next one in its row that has any,
        repeated or cut to the number of its own tiles. The only such sample of a row gets noise.
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
    """The same whichever process makes the row, wherever in the batch."""
    seed = zlib.crc32(np.ascontiguousarray(batch["tokens"][row]).tobytes())
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
