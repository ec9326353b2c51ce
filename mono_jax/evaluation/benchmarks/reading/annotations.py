"""Right answers and captions that are stored in a separate file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from mono_jax.evaluation.benchmarks.reading import columns
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.benchmarks.reading.rows import Row


def with_answers(examples: Iterable[Example], file: Path) -> Iterator[Example]:
    """Adds the right answers of an annotation file: VQA's {"annotations": [...]}, DocVQA's {"data": [...]}.

    Raises DataError that names missing annotations.
    """
    truths: dict[str, tuple[str, ...]] = {}
    for row in _annotations(file):
        truths[str(columns.needed(row, ("question_id", "questionId"), "id"))] = columns.answers(row)
    for example in examples:
        if example.id not in truths:
            raise DataError(f"{file}: no annotation of question {example.id}")
        yield dataclasses.replace(example, truths=truths[example.id])


def captions_of(file: Path) -> Iterator[Row]:
    """Pictures with their captions, from COCO's {"images": [...], "annotations": [{"image_id", "caption"}]}.

    Test sets have no annotations.
    """
    value = _loaded(file)
    captions: dict[str, list[str]] = {}
    for row in _annotations(file) if "annotations" in value else ():
        image = str(columns.needed(row, ("image_id",), "image_id"))
        captions.setdefault(image, []).append(str(columns.needed(row, ("caption",), "caption")))
    for number, image in enumerate(value.get("images") or [], 1):
        row = Row(file, number, image)
        name, of = columns.needed(row, ("file_name", "image"), "file_name"), str(columns.needed(row, ("id",), "id"))
        yield Row(file, number, {"id": of, "image": name, "captions": captions.get(of, [])})


def is_coco(file: Path) -> bool:
    """Whether a JSON file keeps captions separate from pictures, or contains only pictures."""
    if file.suffix != ".json" or not isinstance(value := _loaded(file), dict):
        return False
    images = value.get("images")
    first = images[0] if isinstance(images, list) and images else {}
    return "annotations" in value or (isinstance(first, dict) and "file_name" in first)


def _annotations(file: Path) -> Iterator[Row]:
    value = _loaded(file)
    value = value if isinstance(value, dict) else {}
    found = next((value[key] for key in ("annotations", "data") if isinstance(value.get(key), list)), None)
    if found is None:
        raise DataError(f"{file}: no list of annotations")
    for number, each in enumerate(found, 1):
        yield Row(file, number, each)


def _loaded(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from None
