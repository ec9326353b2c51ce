"""Image-text pairs for stage 1: noisy alt text (S1.1), captions (S1.2), captions with detection and OCR (S1.3)."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_pipelines.recipes.conversations import boxes_text
from data_pipelines.recipes.demo.build import DemoBuild
from data_pipelines.recipes.demo.painter import Picture
from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.manifest import S1_3_SHARES
from data_pipelines.recipes.parts import Counts
from data_pipelines.recipes.shard_writer import ShardWriter, encode_image

DETECTION_PROMPT = "detect the shapes in the image"
OCR_PROMPT = "read the text in the image"
SAMPLES_PER_SHARD = 1000


def write_s1_1(build: DemoBuild, folder: Path) -> Counts:
    """Alt text as written; a share of it belongs to another picture."""
    share = Fraction(str(build.mismatched))
    with ShardWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for index in range(build.sizes.s1_1):
            rng = build.rng("s1_1", index)
            picture = build.painter.any(rng)
            wrong = math.floor((index + 1) * share) > math.floor(index * share)
            _write_pair(writer, picture, build.painter.any(rng).alt if wrong else picture.alt)
    return {"pairs": writer.samples}


def write_s1_2(build: DemoBuild, folder: Path) -> Counts:
    """Alt text in the shards, captions beside them in ``captions.jsonl``."""
    captions = []
    with ShardWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for index in range(build.sizes.s1_2):
            picture = build.painter.any(build.rng("s1_2", index))
            captions.append({"key": _write_pair(writer, picture, picture.alt), "caption": picture.caption})
    write_jsonl(folder / "captions.jsonl", captions)
    return {"pairs": writer.samples}


def write_s1_3(build: DemoBuild, folder: Path) -> Counts:
    """Captions, detection and OCR in the proportions of the paper."""
    words = _common_words(build.paragraphs)
    tasks: dict[str, Callable[[np.random.Generator], tuple[Picture, str]]] = {
        "caption": lambda rng: _with_caption(build.painter.any(rng)),
        "detection": lambda rng: _with_boxes(build, rng),
        "ocr": lambda rng: _with_caption(build.painter.word(rng, words)),
    }
    counts = {}
    for name, paint in tasks.items():
        with ShardWriter(folder / name, samples_per_shard=SAMPLES_PER_SHARD) as writer:
            for index in range(round(S1_3_SHARES[name] * build.sizes.s1_3)):
                _write_pair(writer, *paint(build.rng(f"s1_3/{name}", index)))
        counts[name] = writer.samples
    return counts


def _with_caption(picture: Picture) -> tuple[Picture, str]:
    return picture, picture.caption


def _with_boxes(build: DemoBuild, rng: np.random.Generator) -> tuple[Picture, str]:
    picture, scene = build.painter.scene(rng, shapes=int(rng.integers(1, 3)))
    return picture, boxes_text((shape.label, shape.box()) for shape in scene.shapes)


def _common_words(paragraphs: list[str], count: int = 80) -> list[str]:
    """The most common short words of the prose."""
    frequencies = collections.Counter(word for line in paragraphs for word in line.lower().split())
    short = [word for word, _ in frequencies.most_common(4000) if 3 <= len(word) <= 5 and word.isalpha()]
    return short[:count]


def _write_pair(writer: ShardWriter, picture: Picture, text: str) -> str:
    return writer.write(encode_image(picture.image), text, size=picture.image.size, url=picture.origin)
