"""From a source's raw sample to what is packed: ids, loss mask and raw pixels of one sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.batch import DEFAULT_GEOMETRY, TileGeometry
from data_pipelines.config import CAPTION_PROMPT, DataConfig
from data_pipelines.encoding.captions import clean_caption
from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.crops import Crops
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import check_pixel_path, image_tokens
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.records.video.reference import frame_lines

if TYPE_CHECKING:
    from data_pipelines.records.raw_sample import RawSample


@dataclasses.dataclass
class Sample:
    """One sample of n tokens, v of them visual.

    Attributes:
      key: where it comes from.
      input_ids: int32 [n], the id of ``<IMG_CONTEXT>`` at visual tokens.
      visual: bool [n], True at visual tokens.
      loss_mask: float32 [n], 1 where the id is to be predicted.
      patches: uint8 [v, P, P, 3].
      patch_cells: int32 [v].
    """

    key: str
    input_ids: np.ndarray
    visual: np.ndarray
    loss_mask: np.ndarray
    patches: np.ndarray | Crops
    patch_cells: np.ndarray

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of visual and of text tokens."""
        return len(self.patches), len(self.input_ids) - len(self.patches)


class SampleBuilder:
    """Builds samples, and counts their tokens by exactly the same rules without decoding images."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer | None = None, geometry: TileGeometry = DEFAULT_GEOMETRY
    ):
        """Args:
          tokenizer: None = the one at ``config.tokenizer``.
          geometry: of the model's tiles.

        Raises DataError if the tokenizer, the template or a package is missing.
        """
        self.config, self.geometry = config, geometry
        self.tokenizer = tokenizer or Tokenizer(config.tokenizer)
        self.chat = ChatEncoder(self.tokenizer, config.template, config.system_message)
        self.tiling = Tiling(geometry, config.min_tiles, config.max_tiles, config.thumbnail)
        self.limits = ImageLimits(
            config.max_image_pixels,
            config.max_image_bytes,
            config.min_image_side,
            config.max_aspect,
            config.truncated_jpegs,
        )
        self.most_tokens = config.most_tokens(geometry.tokens_per_tile)
        self.longest_piece = min(config.max_piece or config.text_tokens, config.text_tokens, self.most_tokens)
        if self.longest_piece <= self.chat.begin_length:
            raise DataError(
                f"data.text_tokens, data.max_piece or data.boundary_block leaves {self.longest_piece} tokens for a "
                f"piece of text, but more than {self.chat.begin_length} are needed"
            )
        if config.pixel_path == "device" and geometry.native:
            raise DataError("data.pixel_path='device' makes tiles, but vision.native has none: use 'exact' or 'fast'")
        if config.pixel_path == "device" and config.crop_size < geometry.tile_size:
            raise DataError(f"data.crop_size is {config.crop_size}: it must be at least {geometry.tile_size}, a tile")
        check_pixel_path(config.pixel_path)
        if config.visual_tokens:
            _ = self.chat.image_token  # fails now, not at the first image, if the tokenizer lacks it

    def build(
        self,
        raw: RawSample,
        rng_seed: int = 0,
        prompt: str = CAPTION_PROMPT,
        piece: int = 0,
        out: np.ndarray | Crops | None = None,
    ) -> Sample:
        """The sample in ``raw``.

        Args:
          raw: from a source.
          rng_seed: of the augmentation.
          prompt: question put before a caption.
          piece: which piece of a plain text that is longer than a row.
          out: uint8 [at least v, P, P, 3], contiguous: where to write the patches; None = new memory. Its content is
            undefined when BadSample is raised.

        Raises:
          BadSample, with the key: what is wrong with the images or the text; "too_many_patches" or "too_long" if
            the sample does not fit in a row.
        """
        try:
            return self._build(raw, rng_seed, prompt, piece, out)
        except BadSample as error:
            raise error if error.key else BadSample(error.reason, raw.key, error.detail) from None

    def _build(self, raw: RawSample, rng_seed: int, prompt: str, piece: int, out: np.ndarray | Crops | None) -> Sample:
        patches, cells, counts = self._patches(raw, rng_seed, out)
        images = len(counts)
        if raw.text is not None and not images:
            ids, mask = self.chat.piece(self.chat.plain(raw.text), piece, self.longest_piece)
            visual = np.zeros(len(ids), bool)
        else:
            ids, mask = self._encoded(raw, counts, prompt)
            visual = (ids == self.chat.image_token) if images else np.zeros(len(ids), bool)
        self.check_fits(sum(counts), len(ids) - sum(counts))
        return Sample(raw.key, ids, visual, mask, patches, cells)

    def _patches(
        self, raw: RawSample, rng_seed: int, out: np.ndarray | Crops | None
    ) -> tuple[np.ndarray | Crops, np.ndarray, list[int]]:
        """Visual tokens of all images of a sample, their cells, and the number of tokens of each image."""
        frames = raw.frames or (0,) * len(raw.images)
        tiling = self.tiling.limited(raw.max_tiles).shared(frames.count(0))
        of_frames = self.tiling.limited(raw.frame_tiles)
        rng = np.random.default_rng(rng_seed) if self.config.jpeg_augment or raw.jpeg_augment else None
        images: list[np.ndarray] = []
        cells = [np.zeros(0, np.int32)]
        used = 0
        for data, frame in zip(raw.images, frames, strict=True):
            room = None if out is None else out[used:]
            tiles = of_frames if frame else tiling
            pixels, places = image_tokens(data, tiles, self.limits, self.config.pixel_path, rng, room)
            images.append(pixels)
            cells.append(places)
            used += len(images[-1])
            self.check_fits(used, 0)
        counts = [len(image) for image in images]
        if out is not None:
            return out[:used], np.concatenate(cells), counts
        empty = np.zeros((0, self.geometry.token_pixels, self.geometry.token_pixels, 3), np.uint8)
        patches = images[0] if len(images) == 1 else np.concatenate([empty, *images])
        return patches, np.concatenate(cells), counts

    def turns(self, raw: RawSample, images: int, prompt: str) -> tuple[tuple[str, str], ...]:
        """The conversation in ``raw``; a caption becomes the answer to ``prompt``."""
        if raw.conversations:
            return raw.conversations
        if raw.caption is None:
            raise BadSample("no_caption")
        if not images:
            raise BadSample("no_image")
        if raw.frames:
            prompt = f"{frame_lines(raw.frames)}\n{prompt}"
        return ("human", prompt), ("gpt", clean_caption(raw.caption, self.config.max_caption_chars))

    def check_fits(self, visual: int, text: int) -> None:
        if visual > self.config.visual_tokens:
            raise BadSample("too_many_patches", detail=f"{visual} visual tokens, a row has {self.config.visual_tokens}")
        if text > self.config.text_tokens:
            raise BadSample("too_long", detail=f"{text} text tokens, a row has {self.config.text_tokens}")
        if visual + text > self.most_tokens:
            raise BadSample("too_long", detail=f"{visual + text} tokens, a row has {self.most_tokens}")

    def text_tokens(self, raw: RawSample, images: int, prompt: str = CAPTION_PROMPT) -> tuple[int, bool]:
        """Number of text tokens of a sample read without its images, and whether it is plain text.

        Plain text is counted as a whole, without a begin token. Raises BadSample like ``build``.
        """
        if raw.text is not None and not images:
            return len(self.chat.plain(raw.text)), True
        return len(self._encoded(raw, [0] * images, prompt)[0]), False

    def _encoded(self, raw: RawSample, counts: Sequence[int], prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss mask of everything except plain text; ``counts``: visual tokens of each image."""
        if raw.text is not None:
            return self.chat.document(raw.text, counts)
        return self.chat.conversation(self.turns(raw, len(counts), prompt), counts)

    def visual_tokens(
        self,
        counts: np.ndarray,
        sizes: np.ndarray,
        most_tiles: np.ndarray | None = None,
        frame_tiles: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of visual tokens from image sizes.

        Args:
          counts: int [n], images of each sample.
          sizes: int [sum(counts), 2] width and height.
          most_tiles: int [n], 0 = as in the config; None = as in the config for all.
          frame_tiles: int [sum(counts)], maximum tiles of each video frame; 0 = an image; None = all are images.

        Returns:
          tokens int32 [n] and reason code int32 [n], an index into ``SIZE_REASONS``; 0 = acceptable.
        """
        owner = np.repeat(np.arange(len(counts)), counts)
        codes = np.zeros(len(counts), np.int32)
        wide = sizes.astype(np.int64)
        np.bitwise_or.at(codes, owner, self.limits.refuse(wide[:, 0], wide[:, 1]).astype(np.int32))
        per_image = np.zeros(len(sizes), np.int64)
        good = codes[owner] == 0
        limits = np.zeros(len(counts), np.int32) if most_tiles is None else most_tiles
        frame_tiles = np.zeros(len(sizes), np.int32) if frame_tiles is None else frame_tiles
        shared = np.bincount(owner, frame_tiles == 0, minlength=len(counts)).astype(np.int64)
        for limit, images in sorted(set(zip(limits[shared > 0].tolist(), shared[shared > 0].tolist()))):
            of_these = good & (frame_tiles == 0) & (shared[owner] == images) & (limits[owner] == limit)
            if of_these.any():
                per_image[of_these] = self.tiling.limited(limit).shared(images).tokens(sizes[of_these])
        for limit in sorted(set(frame_tiles.tolist()) - {0}):
            of_these = good & (frame_tiles == limit)
            per_image[of_these] = self.tiling.limited(limit).tokens(sizes[of_these])
        tokens = np.bincount(owner, per_image, minlength=len(counts)).astype(np.int32)
        return tokens, codes
