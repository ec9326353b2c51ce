"""Sizes of the demo sets in these tests, and a reader of their shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from data_pipelines.recipes.demo.sizes import DemoSizes

SIZES = DemoSizes(text_bytes=200_000, s1_1=60, s1_2=40, s1_3=60, s2=60, heldout_captions=20, heldout_questions=80)


def tar_pairs(folder: Path) -> list[tuple[str, Image.Image, str]]:
    """(key, image, text) of every sample in the tars of a folder."""
    pairs = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".jpg"):
                key = name[:-4]
                pairs.append((key, Image.open(io.BytesIO(content[name])), content[f"{key}.txt"].decode()))
    return pairs
