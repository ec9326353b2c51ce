"""Prompts in chunks, each of which the model reads in one call.

    chunk:  S slots, visual tokens first, then text from the next multiple of a block (ragged boundary)
            V V V V V . . . T T T T T . . .

One program serves all chunks of a size, whatever they contain: which expert computes a block is given by an array.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture


class Chunk(NamedTuple):
    """A part of one prompt, as arrays; scalars are NumPy scalars.

    Attributes:
      tokens: int32 [S], of the text slots; targets: int32 [S], the token after each, -1 where none is scored.
      order, positions, segments: int32 [1, S], as in a batch.
      boundary: int32 [1], slots before the text, a multiple of the block.
      feature: int32, the index of the first visual token in its prompt. length: int32, tokens of the whole prompt.
      row: int32, of the request. end: int32, the last text slot. is_last: bool, whether the prompt ends here.
      is_scored: bool, whether log-probabilities of the prompt's tokens are requested.
    """

    tokens: np.ndarray
    targets: np.ndarray
    order: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    boundary: np.ndarray
    feature: np.ndarray
    length: np.ndarray
    row: np.ndarray
    end: np.ndarray
    is_last: np.ndarray
    is_scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens ``start`` to ``stop`` - 1 of a prompt; its visual tokens are ``feature`` to ``feature_stop`` - 1."""

    start: int
    stop: int
    feature: int
    feature_stop: int
    size: int


class Reading:
    """A prompt that is cut into chunks, starting after the tokens that are already cached."""

    def __init__(self, config: Architecture, prompt: Prompt, sizes: tuple[int, ...], block: int):
        """``prompt``: as ``check_prompt`` gives it; ``sizes``: of chunks, ascending.

        Sizes are multiples of ``block``, or smaller: such a chunk is one block of only visual or only text tokens.
        """
        self.ids = np.asarray(prompt.input_ids, np.int32)
        self._sizes, self._block = sizes, block
        self._visual = (self.ids == config.image_token_id) & (config.vision is not None)
        self._whole_images = config.bidirectional_images
        self._before = np.concatenate([[0], np.cumsum(self._visual)])  # visual tokens before each token

    def longest_image(self) -> int:
        """Tokens of the longest run of visual tokens that must fit into one chunk; 0 if none has to."""
        if not self._whole_images:
            return 0
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self._visual.astype(np.int8), [0]]))).reshape(-1, 2)
        return int((edges[:, 1] - edges[:, 0]).max(initial=0))

    def part(self, start: int) -> Part:
        """The longest possible chunk that starts at token ``start``.

        At the end of a prompt, a smaller full chunk is preferred to one that would be a quarter or more padding.
        """
        stop = self._stop(start, self._sizes[-1])
        size = self._fitting(start, stop)
        if stop - start <= 0.75 * size and not self._whole_images:
            for smaller in (s for s in reversed(self._sizes) if s <= stop - start):
                if (end := self._stop(start, smaller)) - start > 0.75 * smaller:
                    stop, size = end, smaller
                    break
        return Part(start, stop, int(self._before[start]), int(self._before[stop]), size)

    def _fitting(self, start: int, stop: int) -> int:
        return next(size for size in self._sizes if self._slots(start, stop, size) <= size)

    def _stop(self, start: int, size: int) -> int:
        """The end of the longest chunk that fits into ``size`` slots."""
        ends = np.arange(start + 1, min(start + size, len(self.ids)) + 1)
        stop = start + int(np.searchsorted(self._slots(start, ends, size), size, side="right"))
        if self._whole_images and stop < len(self.ids) and self._visual[stop - 1] and self._visual[stop]:
            stop -= int(np.argmin(self._visual[start:stop][::-1]))  # before the image
        return stop

    def _slots(self, start: int, stop: np.ndarray | int, size: int) -> np.ndarray | int:
        """The number of slots that the tokens ``start`` to ``stop`` - 1 take in a chunk of ``size``."""
        visual, block = self._before[stop] - self._before[start], min(self._block, size)
        return -(-visual // block) * block + (stop - start - visual)

    def chunk(self, part: Part, row: int, is_scored: bool) -> Chunk:
        ids, is_visual = self.ids[part.start : part.stop], self._visual[part.start : part.stop]
        count, size = len(ids), part.size
        block = min(self._block, size)
        boundary = -(-(part.feature_stop - part.feature) // block) * block
        slots = np.where(is_visual, np.cumsum(is_visual) - 1, boundary + np.cumsum(~is_visual) - 1)
        fields = {name: np.zeros((1, size), np.int32) for name in ("order", "positions", "segments")}
        fields["order"][0] = np.concatenate([slots, np.setdiff1d(np.arange(size), slots)])
        fields["positions"][0, :count] = np.arange(part.start, part.stop)
        fields["segments"][0, :count] = 1
        tokens, targets = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        text = np.flatnonzero(~is_visual)
        tokens[: len(text)] = ids[text]
        after = part.start + text + 1
        inside = after < len(self.ids)
        known = np.where(inside, self.ids[np.minimum(after, len(self.ids) - 1)], -1)
        targets[: len(text)] = np.where(self._visual[np.minimum(after, len(self.ids) - 1)], -1, known)
        return Chunk(
            tokens,
            targets,
            **fields,
            boundary=np.array([boundary], np.int32),
            feature=np.int32(part.feature),
            length=np.int32(len(self.ids)),
            row=np.int32(row),
            end=np.int32(max(len(text) - 1, 0)),
            is_last=np.bool_(part.stop == len(self.ids)),
            is_scored=np.bool_(is_scored),
        )

    def scored(self, part: Part) -> np.ndarray:
        """Prompt positions of the tokens in ``Chunk.targets``, in the order of the slots that have one."""
        text = part.start + np.flatnonzero(~self._visual[part.start : part.stop])
        after = text[text + 1 < len(self.ids)] + 1
        return after[~self._visual[after]]
