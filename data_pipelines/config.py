"""What decides the batches: one frozen tree of settings, checked when it is built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from data_pipelines.batch import BatchSpec
from data_pipelines.encoding.images import ImageLimits, Tiling
from data_pipelines.errors import DataError, check_keys, did_you_mean

CAPTION_PROMPT = "provide a one-sentence caption for the image"  # S1.1 of the Mono-InternVL paper


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of samples.

    Attributes:
      name: label in reports.
      spec: what `data_pipelines.sources.source.open_source` takes ({"kind": "tar", "paths": ..., ...}).
      weight: share of the samples, relative to the other sources' weights; None (for all sources or for none) = the
        source's size, so that every sample of every source appears exactly once per epoch.
      prompts: questions put before a caption; each sample keeps the one that its index picks.
    """

    name: str
    spec: Mapping[str, Any]
    weight: float | None = None
    prompts: tuple[str, ...] = (CAPTION_PROMPT,)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything that decides the batches, and (last group) what only decides how fast they come.

    Attributes:
      sources: where samples come from.
      tokenizer: folder or file: `tokenizer.model` + `added_tokens.json`, or `tokenizer.json`.
      template: chat template (`data_pipelines.encoding.text.TEMPLATES`).
      system_message: None = the template's own, "" = no system turn.
      tile_size, token_pixels: edges in pixels of a tile and of the square that one visual token covers.
      min_tiles, max_tiles: tiles of an image (the thumbnail not counted); a sample's n images share `max_tiles`, each
        getting max(1, max_tiles // n).
      thumbnail: append the whole image as one more tile where there are several.
      ps_version: "v2" reads the visual tokens of a tile row by row, "v1" column by column.
      pixel_path: "exact" (Pillow's bicubic, equal to the reference) or "fast" (scaled JPEG decoding, SIMD resize).
      jpeg_augment: re-encode each tile as JPEG at a random quality 75..100.
      max_image_pixels, max_image_bytes, min_image_side, max_aspect: limits on images, looked at before decoding.
      max_caption_chars: a longer caption is cut at a word.
      visual_tokens, text_tokens: V and T, the slots of a row.
      boundary_block: for mixes whose visual share is not known in advance: above 0, a row has `visual_tokens` slots in
        all, at most `text_tokens` of them text, and a ragged boundary (one of its own) at a multiple of this; needs
        model.mmoe="grouped".
      batch_size: packed rows of the global batch.
      max_piece: plain text is cut into pieces of at most this many tokens; None = T.
      block_samples: consecutive samples of the shuffled order that are packed together.
      seed: of shuffling, augmentation.
      shuffle: "global", "local" (each block draws from `local_runs` runs of `run_length` neighbours) or "none".
      epochs: None = for ever.
      loss_weighting: weight of each of a sample's n trained tokens: "token" 1, "sample" 1/n, "sqrt" 1/sqrt(n).
      workers: processes that make batches; 0 = a thread of this process.
      prefetch: batches made ahead (per worker).
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str
    template: str = "internlm2-chat"
    system_message: str | None = None

    tile_size: int = 448
    token_pixels: int = 28
    min_tiles: int = 1
    max_tiles: int = 6
    thumbnail: bool = True
    ps_version: str = "v2"
    pixel_path: str = "exact"
    jpeg_augment: bool = False
    max_image_pixels: int = 50_000_000
    max_image_bytes: int = 50_000_000
    min_image_side: int = 8
    max_aspect: float = 50.0
    max_caption_chars: int = 1000

    visual_tokens: int = 8192
    text_tokens: int = 2048
    boundary_block: int = 0
    batch_size: int = 8
    max_piece: int | None = None
    block_samples: int = 16_384
    seed: int = 0
    shuffle: str = "global"
    local_runs: int = 32
    run_length: int = 512
    epochs: int | None = None
    loss_weighting: str = "token"

    workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_type(f"data.{name}", getattr(self, name), kind)
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise DataError(f"data.{name} is {getattr(self, name)!r}; {did_you_mean(getattr(self, name), valid)}")
        for name, low in {**_AT_LEAST, "max_tiles": self.min_tiles}.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise DataError(f"data.{name} is {getattr(self, name)}; it must be at least {low}")
        if self.tile_size % self.token_pixels:
            raise DataError(
                f"data.tile_size {self.tile_size} is not a multiple of data.token_pixels {self.token_pixels}"
            )
        if self.boundary_block and (self.visual_tokens % self.boundary_block or self.text_tokens > self.visual_tokens):
            raise DataError(
                f"data.boundary_block is {self.boundary_block}: data.visual_tokens ({self.visual_tokens}), all slots "
                f"of a row then, must be a multiple of it and at least data.text_tokens ({self.text_tokens})"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.sources:
            raise DataError("data.sources is empty; give at least one source")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise DataError(f"data.sources: names must differ, got {names}")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise DataError("data.sources: give a weight to every source or to none")
        for source in self.sources:
            for name, kind in get_type_hints(SourceConfig).items():
                _check_type(f"data.sources[{source.name}].{name}", getattr(source, name), kind)
            if source.weight is not None and not source.weight > 0:
                raise DataError(f"data.sources[{source.name}].weight is {source.weight}; it must be above 0")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> DataConfig:
        """From plain nested dicts, such as an ml_collections ConfigDict's `to_dict()`.

        `sources` may be a list of dicts or a dict name -> dict. Raises DataError that names an unknown key and the
        nearest valid one.
        """
        values = dict(mapping)
        check_keys(values, _names(cls), "data")
        for required in ("sources", "tokenizer"):
            if not values.get(required):
                raise DataError(f"data.{required} is missing")
        given = values["sources"]
        named = (
            given.items() if isinstance(given, Mapping) else ((f"source{n}", fields) for n, fields in enumerate(given))
        )
        values["sources"] = tuple(_source(fields, name) for name, fields in named)
        return cls(**values)

    @property
    def spec(self) -> BatchSpec:
        return BatchSpec(self.visual_tokens, self.text_tokens, self.token_pixels, self.boundary_block)

    @property
    def most_tokens(self) -> int:
        """Tokens of both kinds that a row holds at most; the boundary of elastic rows costs less than a tile."""
        if not self.boundary_block:
            return self.visual_tokens + self.text_tokens
        exact = self.tiling.tokens_per_tile % self.boundary_block == 0
        return self.visual_tokens - (0 if exact else self.boundary_block - 1)

    @property
    def tiling(self) -> Tiling:
        return Tiling(
            self.tile_size, self.token_pixels, self.min_tiles, self.max_tiles, self.thumbnail, self.ps_version
        )

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_pixels, self.max_image_bytes, self.min_image_side, self.max_aspect)

    def digest(self, *fields: str, extra: str = "") -> str:
        """Hash (16 hex digits) of the named fields and of `extra`."""
        values = [{name: getattr(self, name) for name in fields}, extra]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


_CHOICES = {
    "ps_version": ("v1", "v2"),
    "pixel_path": ("exact", "fast"),
    "shuffle": ("global", "local", "none"),
    "loss_weighting": ("token", "sample", "sqrt"),
}
# Of fields that are not None.
_AT_LEAST = {
    **dict.fromkeys(("visual_tokens", "boundary_block", "workers"), 0),
    **dict.fromkeys(
        ("text_tokens", "batch_size", "block_samples", "max_piece", "epochs", "local_runs", "run_length", "prefetch"), 1
    ),
    **dict.fromkeys(("tile_size", "token_pixels", "min_tiles", "min_image_side", "max_aspect", "max_caption_chars"), 1),
}
# Fields that decide a sample's numbers of tokens (with its source and the tokenizer's files).
LENGTH_FIELDS = (
    *("template", "system_message", "tile_size", "token_pixels", "min_tiles", "max_tiles", "thumbnail"),
    *("max_image_pixels", "min_image_side", "max_aspect", "max_caption_chars"),
)
# Fields that decide which samples stand in which row.
PLAN_FIELDS = (
    *LENGTH_FIELDS,
    *(
        "visual_tokens",
        "text_tokens",
        "boundary_block",
        "max_piece",
        "block_samples",
        "seed",
        "shuffle",
        "local_runs",
        "run_length",
    ),
)
# Fields that decide every byte of a batch.
BATCH_FIELDS = (
    *PLAN_FIELDS,
    *("ps_version", "pixel_path", "jpeg_augment", "max_image_bytes", "batch_size", "epochs", "loss_weighting"),
)


def _check_type(key: str, value: Any, kind: Any) -> None:
    """Raises DataError if `value` is not of the annotated type; an int will do for a float."""
    kinds = tuple(
        get_origin(option) or option for option in (get_args(kind) if isinstance(kind, UnionType) else (kind,))
    )
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(
        value, (*kinds, int) if float in kinds else kinds
    ):
        names = " or ".join("None" if option is type(None) else option.__name__ for option in kinds)
        raise DataError(f"{key} is {value!r}; it must be of type {names}")


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _source(fields: Mapping[str, Any] | SourceConfig, name: str) -> SourceConfig:
    if isinstance(fields, SourceConfig):
        return fields
    if not isinstance(fields, Mapping):
        raise DataError(f"data.sources[{name}] is {fields!r}; it must be a dict with 'spec'")
    where = f"data.sources[{fields.get('name', name)}]"
    check_keys(fields, _names(SourceConfig), where)
    if not isinstance(fields.get("spec"), Mapping) or not fields["spec"]:
        raise DataError(f"{where}: 'spec' is missing, a dict with 'kind' and 'paths'")
    values = {"name": name, **fields}
    if "prompts" in values:
        prompts = values["prompts"]
        values["prompts"] = (prompts,) if isinstance(prompts, str) else tuple(prompts) or (CAPTION_PROMPT,)
        if not all(isinstance(prompt, str) for prompt in values["prompts"]):
            raise DataError(f"{where}.prompts is {prompts!r}; it must be a text or a list of texts")
    return SourceConfig(**values)
