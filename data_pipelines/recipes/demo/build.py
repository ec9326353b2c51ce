"""One build of the demo sets: the settings that determine every sample."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from data_pipelines.recipes.demo.painter import Painter
from data_pipelines.recipes.demo.sizes import DemoSizes
from data_pipelines.recipes.parts import sample_rng


@dataclasses.dataclass(frozen=True)
class DemoBuild:
    """One build of the demo sets.

    Attributes:
      root: folder of the sets.
      edge: edge of the pictures in pixels.
      vocabulary: number of tokenizer pieces.
      mismatched: share of the alt texts of S1.1 that belong to another picture.
    """

    root: Path
    seed: int
    sizes: DemoSizes
    edge: int
    vocabulary: int
    mismatched: float

    def rng(self, part: str, index: int = 0) -> np.random.Generator:
        """The generator of one sample of a part."""
        return sample_rng(self.seed, part, index)

    @functools.cached_property
    def painter(self) -> Painter:
        """Paints the training pictures."""
        return Painter(self.edge, heldout=False)

    @functools.cached_property
    def heldout_painter(self) -> Painter:
        """Paints the held-out pictures."""
        return Painter(self.edge, heldout=True)

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """The prose of the training split; the part "text" must have been built."""
        return [line for line in (self.root / "text/train.txt").read_text().splitlines() if line]
