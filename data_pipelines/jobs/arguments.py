"""What the commands on shards share: their arguments, and how they handle storage that does not answer."""

from __future__ import annotations

import argparse

from data_pipelines.errors import StorageError
from data_pipelines.io.storage import Patience
from data_pipelines.sources.formats.registry import FORMATS

_MOST_FAULTS = 3  # consecutive shards that storage does not deliver; after that the rest is not tried


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select the shards and say how they are read."""
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="path, URL or glob; {00000..00127} is expanded")
    parser.add_argument("--kind", choices=sorted(FORMATS), help="kind of source (default: from the name of each path)")
    parser.add_argument("--image_root", help="jsonl: folder of the images (default: the folder of the file)")
    parser.add_argument("--caption_key", help="JSON field or column that holds the caption")
    parser.add_argument("--caption_seed", type=int, help="seed that decides which of several captions a sample gets")
    parser.add_argument("--image_key", help="jsonl, parquet, tfds: field or column that holds the image")
    parser.add_argument(
        "--image_ext", nargs="+", help="tar, files: file extensions of the images, such as jpg or input.png"
    )
    parser.add_argument(
        "--caption_ext", nargs="+", help="tar, files: file extensions of the captions; one is drawn per sample"
    )
    parser.add_argument("--video_frames", type=int, help="maximum number of frames per video (default: 8)")
    parser.add_argument(
        "--video_fps", type=float, help="frames per second of a video (default: as many as --video_frames)"
    )
    parser.add_argument("--video_tiles", type=int, help="maximum number of tiles per frame (default: 1)")
    parser.add_argument("--split", help="tfds: split (default: train)")
    parser.add_argument("--chunk_bytes", type=int, help="text: maximum length of a piece in bytes")
    parser.add_argument(
        "--retries", type=int, default=5, help="retries of a failed read, with pauses that double (default: 5)"
    )
    parser.add_argument(
        "--storage_wait_s", type=float, default=0, help="seconds to wait for storage after the retries (default: 0)"
    )
    parser.add_argument("--hash_images", action="store_true", help="hash images, for the filter unique_images")


def patience(options: argparse.Namespace) -> Patience:
    """The arguments' settings for storage that does not answer."""
    return Patience(options.retries, options.storage_wait_s)


class Faults:
    """Shards that storage does not deliver; ``found`` holds what happened, by path. They do not count as bad data."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._in_a_row = 0

    def add(self, path: str, fault: StorageError | None) -> None:
        """Records how a shard was read. Raises StorageError if storage as a whole is unavailable."""
        self._in_a_row = 0 if fault is None else self._in_a_row + 1
        if fault is None:
            return
        self.found[path] = fault.detail if fault.path == path else str(fault)
        print(f"{path}: could not be read: {self.found[path]}")
        if self._in_a_row >= _MOST_FAULTS:
            raise fault
