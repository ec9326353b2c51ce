"""Prompts of conversations about pictures, built by the code that builds training samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_tokens
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.errors import BadSample
from mono_jax.generation.prompts import Prompt

Picture = tuple[str, bytes]  # its name, for errors, and the encoded file


class Questions:
    """Builds prompts for one model."""

    def __init__(
        self, encoder: ChatEncoder, tiling: Tiling, limits: ImageLimits | None = None, pixel_path: str = "exact"
    ):
        self.encoder, self._tiling = encoder, tiling
        self._limits, self._pixel_path = limits or ImageLimits(), pixel_path

    def prompt(self, turns: Sequence[tuple[str, str]], pictures: Sequence[Picture] = (), answer: bool = True) -> Prompt:
        """The prompt of ``turns``, as ``ChatEncoder.conversation`` takes them; ``answer``: whether one is to follow.

        Raises BadSample like ``image_patches``, naming the picture, and like ``conversation``.
        """
        tiling = self._tiling.shared(len(pictures)) if pictures else self._tiling
        images = []
        for name, data in pictures:
            try:
                images.append(image_tokens(data, tiling, self._limits, self._pixel_path))
            except BadSample as error:
                raise BadSample(error.reason, name, error.detail) from None
        ids, _ = self.encoder.conversation(turns, [len(patches) for patches, _ in images], answer)
        return with_pixels(ids, images)


def with_pixels(ids: np.ndarray, images: Sequence[tuple[np.ndarray, np.ndarray]]) -> Prompt:
    """The prompt of ``ids`` and of the ``image_tokens`` of each image in it."""
    if not images:
        return Prompt(ids)
    patches, cells = zip(*images)
    return Prompt(ids, np.concatenate(patches), np.concatenate(cells))
