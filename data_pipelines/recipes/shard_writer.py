"""Writes image-text shards in img2dataset layout, so that built and downloaded sets are read in the same way.

00000.tar         KEY.jpg, KEY.json, KEY.txt of every sample, each after a PAX header
00000.parquet     the metadata of every sample
00000_stats.json  counts; written last, so that a shard without it was interrupted
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# Fixed, so that equal samples yield equal bytes; the fraction makes tarfile add PAX headers.
_MTIME = 1.5e9 + 0.5
_SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")],
        *[(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")],
        *[(name, pa.string()) for name in ("exif", "sha256")],
    ]
)


def encode_image(image: Image.Image, format: str = "jpg", quality: int = 95) -> bytes:
    """Encoded RGB image; "jpg" (without chroma subsampling, since the images are small) or "png".

    Raises ValueError for another format.
    """
    buffer = io.BytesIO()
    if format == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
    elif format == "png":
        image.save(buffer, "PNG")
    else:
        raise ValueError(f"image format {format!r}: use 'jpg' or 'png'")
    return buffer.getvalue()


class ShardWriter:
    """Writes samples into numbered shards of a folder; use as a context manager.

    Args:
      folder: where the shards are written; created if missing.
      samples_per_shard: a new shard begins after this number of samples. Keys consist of the shard's number in five
        digits and the sample's number, and are therefore unique in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, samples_per_shard: int = 10_000) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard}: at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples = 0
        self._size = samples_per_shard
        self._digits = max(1, len(str(samples_per_shard - 1)))
        self._shard = -1
        self._rows: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None
        self._started = 0.0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()  # no stats file: the shard counts as unfinished

    def write(
        self,
        image: bytes,
        caption: str | None,
        *,
        size: tuple[int, int],
        url: str = "",
        extension: str = "jpg",
    ) -> str:
        """Adds one sample and returns its key. ``size`` is (width, height) of the encoded ``image``."""
        if self._tar is None or len(self._rows) == self._size:
            self._finish()
            self._begin()
        key = f"{self._shard:05d}{len(self._rows):0{self._digits}d}"
        width, height = size
        row = {
            "caption": caption,
            "url": url,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": width,
            "height": height,
            "original_width": width,
            "original_height": height,
            "exif": "{}",
            "sha256": hashlib.sha256(image).hexdigest(),
        }
        self._add(f"{key}.{extension}", image)
        self._add(f"{key}.json", json.dumps(row, indent=4).encode())
        self._add(f"{key}.txt", (caption or "").encode())
        self._rows.append(row)
        self.samples += 1
        return key

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._shard:05d}{suffix}"

    def _begin(self) -> None:
        self._shard += 1
        self._path("_stats.json").unlink(missing_ok=True)
        self._tar = tarfile.open(self._path(".tar"), "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed in _finish)
        self._started = time.time()

    def _add(self, name: str, content: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = len(content), _MTIME, 0o444  # type: ignore[assignment]
        self._tar.addfile(member, io.BytesIO(content))

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA), self._path(".parquet"))
        end = time.time()
        stats = {
            "count": len(self._rows),
            "successes": len(self._rows),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "duration": end - self._started,
            "start_time": self._started,
            "end_time": end,
            "status_dict": {"success": len(self._rows)},
        }
        self._path("_stats.json").write_text(json.dumps(stats, indent=4))
        self._tar, self._rows = None, []


def read_captions(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The captions of every shard in a folder, in order."""
    for path in sorted(Path(folder).glob("*.parquet")):
        yield from pq.read_table(path, columns=["caption"]).column("caption").to_pylist()
