"""Small sets on disk, and the configs that read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.batch import TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.recipes.shard_writer import ShardWriter

SENTENCE = "a red kite over the grey sea and some green hill with small houses near water"
WORDS = SENTENCE.split()
GEOMETRY = TileGeometry(tile_size=56)


def picture(rng: np.random.Generator, width: int, height: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    colours = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int, *, seed: int = 0, broken: tuple[int, ...] = (), per_shard: int = 40) -> None:
    """``count`` image-text pairs in tars; images whose number is in ``broken`` are truncated."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for number in range(count):
            width, height = (int(edge) for edge in rng.integers(20, 150, 2))
            image = picture(rng, width, height)
            if number in broken:
                image = image[: len(image) // 2]
            caption = " ".join(rng.choice(WORDS, rng.integers(2, 12)))
            writer.write(image, caption, size=(width, height))


def write_conversations(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def config(golden: Path, *sources: dict[str, Any], **changes: Any) -> DataConfig:
    """At most 3 tiles (of ``GEOMETRY``: 4 visual tokens each) and a thumbnail."""
    values = {
        "sources": list(sources),
        "tokenizer": str(golden / "chat"),
        "system_message": "",
        "max_tiles": 3,
        "visual_tokens": 32,
        "text_tokens": 320,
        "batch_size": 8,
        "block_samples": 64,
        "seed": 3,
        "epochs": 1,
    }
    return DataConfig.from_dict({**values, **changes})


def packed(settings: DataConfig, cache: Path) -> PackedData:
    return PackedData(settings, cache, GEOMETRY)


def talk_source(folder: Path, **fields: Any) -> dict[str, Any]:
    spec = {"kind": "jsonl", "paths": str(folder / "talks.jsonl"), "image_root": str(folder)}
    return {"name": "talks", "spec": spec, **fields}


def tars(folder: Path, name: str = "pairs", **fields: Any) -> dict[str, Any]:
    return {"name": name, "spec": {"kind": "tar", "paths": str(folder / "*.tar")}, **fields}
