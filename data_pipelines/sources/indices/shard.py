"""A shard: one file or folder of samples, and the options that say how it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.records.video.frames import Sampling


@dataclasses.dataclass(frozen=True)
class Options:
    """How shards of a format are read; each format has its own subclass. None and False stand for "not given"."""

    def given(self) -> dict[str, Any]:
        """The options that differ from "not given": those on which an index depends."""
        return {name: value for name, value in vars(self).items() if value not in (None, False)}


@dataclasses.dataclass(frozen=True)
class FrameOptions(Options):
    """Options of formats that hold frames of videos.

    Attributes:
      video_tiles: maximum tiles per frame, not counting the thumbnail (default: 1).
    """

    video_tiles: int | None = None

    def __post_init__(self) -> None:
        """Raises DataError."""
        tiles = 1 if self.video_tiles is None else self.video_tiles
        if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1:
            raise DataError(f"video_tiles must be a positive number, got {tiles!r}")


@dataclasses.dataclass(frozen=True)
class VideoOptions(FrameOptions):
    """Options of formats that read videos, or choose among their frames.

    Attributes:
      video_frames: maximum number of frames per video (default: 8).
      video_fps: frames per second (default: always ``video_frames``, equally spaced).
    """

    video_frames: int | None = None
    video_fps: float | None = None

    def __post_init__(self) -> None:
        """Raises DataError."""
        super().__post_init__()
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        return Sampling(Sampling.frames if self.video_frames is None else self.video_frames, self.video_fps)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a source.

    Attributes:
      kind: of source; a key of ``formats.registry.FORMATS``.
      path: path or URL of the file or folder.
      options: determine the content of its index.
      name: its part of the samples' keys; empty as long as it is not part of a source.
      mark: the stamp of a local file when its index was opened; empty = not compared.
      content: the ``content_mark`` of a local file when it was indexed; empty = not compared.
      origin: the file from which it was converted; empty = itself.
      fault: why it could not be converted to a readable format; empty = it could be, or need not be.
      max_tiles: maximum tiles of its images, 0 = as in the config. jpeg_augment: as if the config said so for it.
    """

    kind: str
    path: str
    options: Options
    name: str = ""
    mark: str = ""
    content: str = ""
    origin: str = ""
    fault: str = ""
    max_tiles: int = 0
    jpeg_augment: bool = False

    @property
    def source(self) -> str:
        """The file as the user knows it."""
        return self.origin or self.path

    @property
    def encoding(self) -> str:
        """Its settings that affect how samples are encoded, for identities; empty if that is left to the config."""
        frames = f"frames {self.frame_tiles}" if self.frame_tiles > 1 else ""
        return f"{self.max_tiles} {self.jpeg_augment}{frames}" if self.max_tiles or self.jpeg_augment else frames

    @property
    def frame_tiles(self) -> int:
        """Maximum tiles of a video frame."""
        return getattr(self.options, "video_tiles", None) or 1
