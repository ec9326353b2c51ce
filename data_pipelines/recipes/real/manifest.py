"""The manifest of the real sets that have been built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.recipes.manifest import (
    S1_3_SHARES,
    STAGES,
    Source,
    conversation_source,
    heldout_entry,
    pair_source,
    stage_entries,
    text_source,
)
from data_pipelines.recipes.parts import Counts
from data_pipelines.recipes.real import detection, ocr, questions

VERSION = 1
LICENCES = "licences.json"  # beside the samples of a set: package -> licence

Built = dict[str, dict[str, Counts]]  # stage -> set -> counts of the sets that have been built


def make_manifest(root: Path, built: Built, seed: int) -> dict[str, Any]:
    """The manifest of the sets that have been built in ``root``."""
    return {
        "version": VERSION,
        "seed": seed,
        "tile_size": 448,
        "token_pixels": 28,
        "tokenizer": "tokenizer",
        "stages": stage_entries(_samples(built), _sources(built)),
        "heldout": _heldout(root),
        "licences": _licences(root, built),
    }


def made_samples(counts: Counts) -> int:
    """Samples of a set without those held out: the only one of its counts that counts samples."""
    return sum(counts.get(unit, 0) for unit in ("pairs", "conversations", "documents", "questions"))


def _samples(built: Built) -> dict[str, int]:
    samples = {
        stage: sum(map(made_samples, built.get("text" if stage == "s0" else stage, {}).values())) for stage in STAGES
    }
    if built.get("s1_3"):
        samples["s1_3"] += samples["s1_2"]
    return samples | {f"s2_{lesson}": count for lesson, count in _lessons(built).items()}


def _lessons(built: Built) -> dict[str, int]:
    """The lessons of easy-vqa, which are stages of their own, with their number of samples; older folders have none."""
    counts = built.get("s2", {}).get("easy_vqa", {})
    return {lesson: counts[lesson] for lesson in questions.LESSONS if lesson in counts}


def _sources(built: Built) -> dict[str, list[Source]]:
    captioned = [
        pair_source(name, f"s1_2/{name}", CAPTION_PROMPT, captions=f"s1_2/{name}/captions.jsonl")
        for name in built.get("s1_2", {})
    ]
    return {
        "s0": [text_source(name, f"text/{name}/train.txt") for name in built.get("text", {})],
        "s1_1": [pair_source(name, f"s1_1/{name}", CAPTION_PROMPT) for name in built.get("s1_1", {})],
        "s1_2": captioned,
        "s1_3": _alignment_sources(captioned, built),
        "s2": [
            conversation_source(name, f"s2/{name}/train.jsonl", f"s2/{name}/images") for name in built.get("s2", {})
        ],
        **{
            f"s2_{lesson}": [conversation_source("easy_vqa", f"s2/easy_vqa/{lesson}.jsonl", "s2/easy_vqa/images")]
            for lesson in _lessons(built)
        },
    }


def _alignment_sources(captioned: list[Source], built: Built) -> list[Source]:
    """S1.3 in the proportions of the paper; the share of captions is divided in proportion to the sets' sizes."""
    total = sum(counts["pairs"] for counts in built.get("s1_2", {}).values())
    prompts = {"detection": detection.PROMPT, "ocr": ocr.PROMPT}
    sources = [
        source | {"weight": S1_3_SHARES["caption"] * built["s1_2"][source["name"]]["pairs"] / total}
        for source in captioned
        if total
    ]
    return sources + [
        pair_source(name, f"s1_3/{name}", prompts[name], weight=S1_3_SHARES[name]) for name in built.get("s1_3", {})
    ]


def _heldout(root: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {"text": "heldout/text.txt"}
    files = {
        "captions": "heldout/captions.jsonl",
        "questions": "s2/collages/heldout.jsonl",
        "easy_vqa": "s2/easy_vqa/heldout.jsonl",
    }
    for name, path in files.items():
        if (root / path).is_file() and (root / path).stat().st_size:
            entries[name] = heldout_entry(root, path, with_majority=name != "captions")
            if name == "captions":
                entries[name]["image_root"] = "."  # its pictures are in the folders of several sets
    return entries


def _licences(root: Path, built: Built) -> dict[str, str]:
    """Package -> licence, for every set that has been built."""
    licences: dict[str, str] = {}
    for stage in sorted(built):
        for name in sorted(built[stage]):
            licences |= json.loads((root / stage / name / LICENCES).read_text())
    return licences
