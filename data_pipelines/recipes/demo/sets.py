"""Builds the demo sets (``demo/__init__.py`` shows the folder): text, the parts of each stage, tokenizer, manifest."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.errors import DataError
from data_pipelines.io.processes import end_with_parent
from data_pipelines.recipes import prose
from data_pipelines.recipes.demo.build import DemoBuild
from data_pipelines.recipes.demo.conversations import write_s0, write_s2
from data_pipelines.recipes.demo.heldout import write_heldout
from data_pipelines.recipes.demo.pairs import DETECTION_PROMPT, OCR_PROMPT, write_s1_1, write_s1_2, write_s1_3
from data_pipelines.recipes.demo.sizes import DemoSizes
from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.manifest import (
    S1_3_SHARES,
    STAGES,
    conversation_source,
    heldout_entry,
    load_manifest,
    pair_source,
    stage_entries,
    text_source,
    write_manifest,
)
from data_pipelines.recipes.parts import Counts, Progress, build_part
from data_pipelines.recipes.shard_writer import read_captions
from data_pipelines.recipes.tokenizer import train_tokenizer

VERSION = 1
HELDOUT = ("captions", "questions", "easy_vqa")  # sets of questions, beside "text"
PACKAGES = ("scikit-learn", "scikit-image", "easy-vqa", "pillow", "sentencepiece")


def build_demo_sets(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    sizes: DemoSizes | None = None,
    edge: int = 64,
    token_pixels: int = 16,
    vocabulary: int = 1024,
    mismatched: float = 0.02,
    workers: int = 1,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Builds the demo sets, or the missing parts of them, and returns the manifest with absolute paths.

    Args:
      out_dir: folder of the sets. Parts that an earlier call finished with the same arguments are kept; each part
        appears only when it is complete, so that an interrupted build resumes where it stopped.
      seed: determines every picture, text and split.
      sizes: samples of each set.
      edge: edge of the pictures in pixels: the tile size to train with, or a multiple of it.
      token_pixels: edge of the square that one visual token covers; divides ``edge``.
      vocabulary: number of tokenizer pieces, without the added tokens.
      mismatched: share of the alt texts of S1.1 that belong to another picture.
      workers: processes that paint; more than one requires a guarded main module. It does not change the sets.
      progress: called with one line for each part that is built.

    Raises:
      DataError: a package is missing, or an argument does not fit.
    """
    sizes = sizes or DemoSizes()
    if edge % token_pixels:
        raise DataError(
            f"edge={edge} is not a multiple of token_pixels={token_pixels}: choose, say, edge=64, token_pixels=16"
        )
    build = DemoBuild(Path(out_dir), seed, sizes, edge, vocabulary, mismatched)
    settings = {"version": VERSION, **dataclasses.asdict(build)}
    del settings["root"]
    part = functools.partial(_part, build, settings)
    try:
        counts = {"text": part("text", progress)}
        counts |= _painted(part, workers, progress)
        counts |= {"tokenizer": part("tokenizer", progress)}
    except ImportError as error:
        raise DataError(f"the demo sets need the package {error.name}: pip install -r requirements.txt") from error
    write_manifest(build.root, _manifest(build, token_pixels, counts))
    return load_manifest(build.root)


def _part(build: DemoBuild, settings: Mapping[str, Any], name: str, progress: Progress) -> Counts:
    return build_part(build.root, name, settings, functools.partial(_WRITERS[name], build), progress)


def _painted(part: Callable[[str, Progress], Counts], workers: int, progress: Progress) -> dict[str, Counts]:
    """The parts with pictures and chats, each in one process; the largest is started first."""
    if workers == 1:
        return {name: part(name, progress) for name in PAINTED}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        painted = {name: pool.submit(_quietly, part, name) for name in PAINTED}
        counts = {}
        for name, future in painted.items():
            counts[name], lines = future.result()
            for line in lines:
                progress(line)
    return counts


def _quietly(part: Callable[[str, Progress], Counts], name: str) -> tuple[Counts, list[str]]:
    """A part and the progress lines of its build."""
    lines: list[str] = []
    return part(name, lines.append), lines


def write_text(build: DemoBuild, folder: Path) -> Counts:
    """Documents of prose in random order; one in twenty is held out."""
    documents = list(prose.documents())
    order = [documents[i] for i in build.rng("text").permutation(len(documents))]
    train = [document.paragraphs for document in order if not document.is_heldout()]
    heldout = [document.paragraphs for document in order if document.is_heldout()]
    limit = build.sizes.text_bytes
    return {
        "train_bytes": prose.write_documents(folder / "train.txt", train, limit),
        "heldout_bytes": prose.write_documents(folder / "heldout.txt", heldout, limit // 20),
    }


def write_tokenizer(build: DemoBuild, folder: Path) -> Counts:
    """A tokenizer trained on everything that the other parts train on."""
    return train_tokenizer(folder, _sentences(build), build.vocabulary)


# Each depends only on the build, except for the prose of "text", which is built before, and the tokenizer, built last.
PAINTED = ("s2", "s0", "s1_1", "s1_2", "s1_3", "heldout")
_WRITERS = {
    "text": write_text,
    "s0": write_s0,
    "s1_1": write_s1_1,
    "s1_2": write_s1_2,
    "s1_3": write_s1_3,
    "s2": write_s2,
    "heldout": write_heldout,
    "tokenizer": write_tokenizer,
}


def _sentences(build: DemoBuild) -> Iterator[str]:
    """The prose, and every caption, question and answer used in training."""
    yield from build.paragraphs
    for folder in ("s1_1", "s1_2", "s1_3/caption", "s1_3/detection", "s1_3/ocr"):
        yield from read_captions(build.root / folder)
    yield from (record["caption"] for record in read_jsonl(build.root / "s1_2/captions.jsonl"))
    for stage in ("s0", "s2"):
        for path in sorted((build.root / stage).glob("*.jsonl")):
            for record in read_jsonl(path):
                yield from (turn["value"].rsplit("\n", 1)[-1] for turn in record["conversations"])
    yield from ["user", "assistant", "system", CAPTION_PROMPT, DETECTION_PROMPT, OCR_PROMPT] * 1000


def _manifest(build: DemoBuild, token_pixels: int, counts: Mapping[str, Counts]) -> dict[str, Any]:
    prompts = {"caption": CAPTION_PROMPT, "detection": DETECTION_PROMPT, "ocr": OCR_PROMPT}
    sources = {
        "s0": [text_source("prose", "text/train.txt"), conversation_source("chat", "s0/chat.jsonl")],
        "s1_1": [pair_source("alt_text", "s1_1", CAPTION_PROMPT)],
        "s1_2": [pair_source("captions", "s1_2", CAPTION_PROMPT, captions="s1_2/captions.jsonl")],
        "s1_3": [
            pair_source(name, f"s1_3/{name}", prompt, weight=S1_3_SHARES[name]) for name, prompt in prompts.items()
        ],
        "s2": [conversation_source(name, f"s2/{name}.jsonl", "s2/images") for name in counts["s2"]],
    }
    samples = {"s0": len((build.root / "text/train.txt").read_text().split("\n\n")) - 1}
    samples |= {stage: sum(counts[stage].values()) for stage in STAGES[1:]}
    heldout = {
        name: heldout_entry(build.root, f"heldout/{name}.jsonl", with_majority=name != "captions") for name in HELDOUT
    }
    return {
        "version": VERSION,
        "seed": build.seed,
        "tile_size": build.edge,
        "token_pixels": token_pixels,
        "tokenizer": "tokenizer",
        "stages": stage_entries(samples, sources),
        "heldout": {"text": "text/heldout.txt", **heldout},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
