"""The manifest of a folder of sets: which sources each stage trains on, and what is held out.

``load_manifest`` returns it with absolute paths:

    {"version", "seed", "tile_size", "token_pixels", "tokenizer": FOLDER,
     "stages": {"s0" | "s1_1" | "s1_2" | "s1_3" | "s2" | (real) "s2_affirmative" | "s2_any_wording":
                    {"samples": N, "sources": [{"name", "spec": {"kind", "paths", ...}, "weight"?, "prompts"?}]}},
     "heldout": {"text": FILE,
                 NAME: {"path", "image_root", "samples", "majority_answer"?, "majority_accuracy"?}},
     "packages": {NAME: VERSION} (demo) | "licences": {PACKAGE: LICENCE} (real)}

The entries of ``sources`` are those that ``SourceConfig`` accepts; the samples of s0 are documents. A line of a
held-out file is a LLaVA record (``id``, ``image``, ``conversations`` with one question and its answer) plus ``kind``
(the skill tested, or the type of picture).
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import publish
from data_pipelines.recipes.jsonl import read_jsonl

MANIFEST = "manifest.json"
STAGES = ("s0", "s1_1", "s1_2", "s1_3", "s2")
S1_3_SHARES = {"caption": 0.539, "detection": 0.052, "ocr": 0.409}  # of the samples of S1.3 (Mono-InternVL paper)

Source = dict[str, Any]


def text_source(name: str, file: str) -> Source:
    """Documents of a text file."""
    return {"name": name, "spec": {"kind": "text", "paths": [file]}}


def pair_source(
    name: str, folder: str, prompt: str, *, captions: str | None = None, weight: float | None = None
) -> Source:
    """Image-text pairs in the shards of a folder; ``captions`` names a JSONL file whose captions are joined by key."""
    spec = {"kind": "tar", "paths": [f"{folder}/*.tar"]} | ({"captions": captions} if captions else {})
    return {"name": name, "spec": spec} | ({} if weight is None else {"weight": weight}) | {"prompts": [prompt]}


def conversation_source(name: str, file: str, image_root: str | None = None) -> Source:
    """Conversations in a JSONL file; ``image_root`` is the folder of the pictures that they name, if any."""
    spec = {"kind": "jsonl", "paths": [file]} | ({"image_root": image_root} if image_root else {})
    return {"name": name, "spec": spec}


def stage_entries(samples: Mapping[str, int], sources: Mapping[str, Sequence[Source]]) -> dict[str, Any]:
    """The entry "stages" of a manifest, from the samples and the sources of every stage."""
    return {stage: {"samples": samples[stage], "sources": sources[stage]} for stage in sources}


def heldout_entry(root: Path, path: str, *, with_majority: bool) -> dict[str, Any]:
    """The entry of a held-out JSONL file; ``with_majority`` adds the score of always giving the most common answer."""
    answers = collections.Counter(record["conversations"][1]["value"] for record in read_jsonl(root / path))
    entry: dict[str, Any] = {"path": path, "image_root": f"{Path(path).parent}/images", "samples": answers.total()}
    if with_majority:
        answer, count = answers.most_common(1)[0]
        entry |= {"majority_answer": answer, "majority_accuracy": count / answers.total()}
    return entry


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``root/manifest.json``; it is written last, so that a folder with a manifest is complete."""
    publish.write_text(root / MANIFEST, json.dumps(manifest, indent=1))


def load_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder of sets, its paths made absolute.

    Raises DataError if the sets are not built, or the manifest is damaged.
    """
    root = Path(folder).absolute()
    path = root / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{path} is missing: build the sets first (python -m data_pipelines.demo_sets or real_sets --out={folder})"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not {"tokenizer", "stages", "heldout"} <= value.keys():
        raise DataError(f"{path}: damaged: remove it and build the sets again; intact parts are kept")
    return _absolute(value, root)


_PATH_KEYS = ("paths", "path", "captions", "scores", "image_root", "tokenizer", "text")


def _absolute(value: Any, root: Path, key: str | None = None) -> Any:
    if isinstance(value, dict):
        return {k: _absolute(v, root, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_absolute(v, root, key) for v in value]
    return str(root / value) if isinstance(value, str) and key in _PATH_KEYS else value
