"""Prompts of conversations about pictures, made by the code that makes training samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling, patch_cells
from data_pipelines.errors import BadSample
from mono_jax.generation.prompts import Prompt

Picture = tuple[str, bytes]  # its name, for errors, and the encoded file


class Questions:
    """Makes prompts for one model."""

    def __init__(
        self, encoder: ChatEncoder, tiling: Tiling, limits: ImageLimits | None = None, pixel_path: str = "exact"
    ):
        self.encoder, self._tiling = encoder, tiling
        self._limits, self._pixel_path = limits or ImageLimits(), pixel_path

    def prompt(self, turns: Sequence[tuple[str, str]], pictures: Sequence[Picture] = (), answer: bool = True) -> Prompt:
        """The prompt of ``turns``, as ``ChatEncoder.conversation`` takes them; ``answer``: one is to come.

        Raises BadSample: as ``image_patches``, naming the picture, and as ``conversation``.
        """
        tiling = self._tiling.shared(len(pictures)) if pictures else self._tiling
        patches = []
        for name, data in pictures:
            try:
                patches.append(image_patches(data, tiling, self._limits, self._pixel_path))
            except BadSample as error:
                raise BadSample(error.reason, name, error.detail) from None
        ids, _ = self.encoder.conversation(turns, [len(each) for each in patches], answer)
        return with_pixels(ids, patches, tiling)


def with_pixels(ids: np.ndarray, patches: Sequence[np.ndarray], tiling: Tiling) -> Prompt:
    """The prompt of ``ids`` and the visual tokens of each image in it, uint8 [v, P, P, 3]."""
    if not patches:
        return Prompt(ids)
    cells = [patch_cells(tiling.geometry, len(of_image)) for of_image in patches]
    return Prompt(ids, np.concatenate(patches), np.concatenate(cells))
