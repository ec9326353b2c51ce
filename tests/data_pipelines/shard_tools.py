"""Small encoded images and shards for tests, whole and damaged."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.sources.source import Source


@functools.cache
def encoded(width: int = 40, height: int = 30, format: str = "JPEG", orientation: int = 1, seed: int = 0) -> bytes:
    """An image of noise; ``orientation`` goes into its EXIF data."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format, **({"exif": exif} if orientation != 1 else {}))
    return buffer.getvalue()


def tar_bytes(members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> bytes:
    """An archive; the fraction in ``mtime`` makes tarfile put PAX headers before members, as img2dataset does."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, **metadata: object) -> list[tuple[str, bytes]]:
    """Members of ``count`` image-text pairs in the layout of img2dataset; captions "caption 0", ..."""
    members = []
    for i in range(count):
        fields: Mapping[str, object] = {"key": f"{i:05d}", "caption": f"caption {i}", "similarity": 0.1 * i, **metadata}
        members += [
            (f"{i:05d}.jpg", encoded(40 + i, 30, seed=i)),
            (f"{i:05d}.json", json.dumps(fields).encode()),
            (f"{i:05d}.txt", f"caption {i}".encode()),
        ]
    return members


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], successes: int | None = None) -> Path:
    """Writes an archive, and its stats file if ``successes`` is given."""
    path.write_bytes(tar_bytes(members))
    if successes is not None:
        path.with_name(path.stem + "_stats.json").write_text(json.dumps({"successes": successes}))
    return path


TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]


def write_jsonl(path: Path, *records: object) -> Path:
    """Writes a record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def keys(source: Source) -> list[str]:
    """The keys of all samples of a source."""
    return [source.read_text(i).key for i in range(len(source))]
