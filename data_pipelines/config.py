"""What decides the batches: one frozen tree of settings, checked when it is built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines import strict
from data_pipelines.batch import BatchSpec, TileGeometry
from data_pipelines.errors import DataError
from data_pipelines.strict import field

CAPTION_PROMPT = "provide a one-sentence caption for the image"  # S1.1 of the Mono-InternVL paper


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of samples."""

    name: str = field("", help='label in reports and in overrides; "" = source0, source1, ...')
    spec: Mapping[str, Any] = field(
        default_factory=dict,
        help='what to open, e.g. {"kind": "tar", "paths": "shards/*.tar"}; see sources.source.open_source',
    )
    weight: float | None = field(
        None,
        gt=0,
        help="share of the samples, relative to the other sources' weights; None for all sources = their sizes, so "
        "that every sample of every source appears exactly once per epoch; None for some = the rest up to 1, "
        "shared by size",
    )
    prompts: str | tuple[str, ...] = field(
        (CAPTION_PROMPT,),
        help="one or more questions put before a caption; the sample's index picks one, which stays the same",
    )

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts or (CAPTION_PROMPT,))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything that decides the batches but the model's ``TileGeometry``; the last group only decides their speed.

    Raises DataError that names the key, the value and what is expected.
    """

    sources: tuple[SourceConfig, ...] = field(help="where samples come from")
    tokenizer: str = field(help="folder or file: tokenizer.model + added_tokens.json, or tokenizer.json")
    template: str = field(
        "internlm2-chat", help="chat template: internlm2-chat, or tokenizer (the one that comes with the tokenizer)"
    )
    system_message: str | None = field(None, help='system turn; None = the template\'s own, "" = none')

    min_tiles: int = field(1, ge=1, help="fewest tiles of an image, not counting the thumbnail")
    max_tiles: int = field(
        6, ge=1, help="maximum tiles of an image; a sample's n images get max(1, max_tiles // n) each"
    )
    thumbnail: bool = field(True, help="append the whole image as another tile if there are several")
    pixel_path: Literal["exact", "fast", "device"] = field(
        "exact",
        help='"exact" = Pillow\'s bicubic filter, identical to the reference; "fast" = scaled JPEG decoding and SIMD '
        'resizing; "device" = the host only decodes and the accelerator makes the tiles, also identical to the '
        "reference",
    )
    crop_size: int = field(
        1024,
        ge=1,
        help='with pixel_path "device": edge, in pixels, of the buffer for the part of an image that a tile depends '
        "on; tiles that need a larger part are made on the host",
        on_resume="free",
    )
    jpeg_augment: bool = field(False, help="re-encode each tile as JPEG at a random quality 75..100")
    max_image_pixels: int = field(50_000_000, ge=1, help="limit of width x height, checked before decoding")
    max_image_bytes: int = field(50_000_000, ge=1, help="limit for an encoded image")
    min_image_side: int = field(8, ge=1, help="smallest width and height of an image, pixels")
    max_aspect: float = field(50.0, ge=1, help="limit for an image's longer edge / shorter edge")
    truncated_jpegs: bool = field(
        False,
        help="decode truncated JPEGs as far as they go, with the missing part grey, instead of skipping them",
    )
    max_caption_chars: int = field(1000, ge=1, help="longer captions are cut at a word boundary")

    visual_tokens: int = field(8192, ge=0, help="V, visual slots of a row")
    text_tokens: int = field(2048, ge=1, help="T, text slots of a row")
    boundary_block: int = field(
        0,
        ge=0,
        help="above 0, for mixes whose visual share is not known in advance: a row has visual_tokens slots in total, "
        "at most text_tokens of them text, and its own (ragged) boundary between the two at a multiple of this; "
        "needs execution.experts=grouped",
    )
    batch_size: int = field(8, ge=1, help="packed rows of the global batch")
    max_piece: int | None = field(None, ge=1, help="plain text is split into pieces of this many tokens; None = T")
    block_samples: int = field(16_384, ge=1, help="consecutive samples of the shuffled order that are packed together")
    seed: int = field(0, help="seed of shuffling and augmentation")
    shuffle: Literal["global", "local", "none"] = field(
        "global", help='"local": each block draws from local_runs runs of run_length neighbouring samples'
    )
    local_runs: int = field(32, ge=1, help="runs that are shuffled together")
    run_length: int = field(512, ge=1, help="neighbouring samples of a run")
    epochs: int | None = field(None, ge=1, help="passes over the data; None = unlimited")
    loss_weighting: Literal["token", "sample", "sqrt"] = field(
        "token", help="weight of each of a sample's n trained tokens: 1, 1/n or 1/sqrt(n)"
    )
    source_ids: bool = field(
        False, help="batches record which source each text slot comes from, for a loss per source", on_resume="free"
    )

    retries: int = field(
        5, ge=0, help="retries of a failed read, with pauses that start at 0.5 s and double", on_resume="free"
    )
    storage_wait_s: float = field(
        600.0, ge=0, help="seconds to wait for storage after the retries, before the run stops", on_resume="free"
    )
    workers: int = field(0, ge=0, help="processes that make batches; 0 = a thread in this process", on_resume="free")
    prefetch: int = field(2, ge=1, help="batches made ahead, per worker", on_resume="free")

    def __post_init__(self) -> None:
        strict.check(self, "data")
        if not self.tokenizer:
            raise DataError("data.tokenizer is missing: name a folder with tokenizer.model or tokenizer.json")
        if self.max_tiles < self.min_tiles:
            raise DataError(f"data.max_tiles is {self.max_tiles}: it must be at least data.min_tiles, {self.min_tiles}")
        block, visual, text = self.boundary_block, self.visual_tokens, self.text_tokens
        if block and (visual % block or text > visual):
            raise DataError(
                f"data.boundary_block is {block}: data.visual_tokens ({visual}), all slots of a row then, must be a "
                f"multiple of it and at least data.text_tokens ({text})"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.sources:
            raise DataError("data.sources is empty: give at least one source")
        named = (dataclasses.replace(s, name=s.name or f"source{number}") for number, s in enumerate(self.sources))
        object.__setattr__(self, "sources", tuple(named))
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise DataError(f"data.sources: names must differ, got {names}")
        for source in self.sources:
            if not source.spec:
                raise DataError(f"data.sources.{source.name}.spec is missing: give a mapping with 'kind' and 'paths'")
        given = [source.weight for source in self.sources if source.weight is not None]
        if given and len(given) < len(self.sources) and sum(given) >= 1:
            raise DataError(
                f"data.sources: the weights of some are shares where others have none, but sum to {sum(given):g}: give "
                "every source a weight, or make them less than 1 in all"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """From plain nested dicts; ``sources`` may be a list of dicts or a dict name -> dict. Raises DataError."""
        return strict.build(cls, values, "data")

    def most_tokens(self, tokens_per_tile: int) -> int:
        """Tokens of both kinds that a row holds at most; a ragged boundary costs less than a block."""
        if not self.boundary_block:
            return self.visual_tokens + self.text_tokens
        exact = tokens_per_tile % self.boundary_block == 0
        return self.visual_tokens - (0 if exact else self.boundary_block - 1)

    def batch_spec(self, geometry: TileGeometry) -> BatchSpec:
        """Static sizes of the batches for a model that cuts tiles so."""
        return BatchSpec(
            self.visual_tokens, self.text_tokens, geometry.token_pixels, self.boundary_block, self.source_ids
        )

    def digest(self, *fields: str, extra: str = "") -> str:
        """Hash (16 hex digits) of the named fields and of ``extra``."""
        named = {name: getattr(self, name) for name in fields}
        values = [{name: value for name, value in named.items() if value or name not in _ADDED}, extra]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# Fields that decide a sample's numbers of tokens (with its source, the tile geometry and the tokenizer's files).
LENGTH_FIELDS = (
    *("template", "system_message", "min_tiles", "max_tiles", "thumbnail"),
    *("max_image_pixels", "min_image_side", "max_aspect", "max_caption_chars"),
)
# Fields that decide which samples stand in which row.
PLAN_FIELDS = (
    *LENGTH_FIELDS,
    *("visual_tokens", "text_tokens", "boundary_block", "max_piece"),
    *("block_samples", "seed", "shuffle", "local_runs", "run_length"),
)
# Fields that decide every byte of a batch.
BATCH_FIELDS = (
    *PLAN_FIELDS,
    *("pixel_path", "jpeg_augment", "max_image_bytes", "truncated_jpegs", "batch_size", "epochs", "loss_weighting"),
)
# Fields that came later: where they are off, the identities of earlier runs stand.
_ADDED = frozenset(["truncated_jpegs"])
