"""Builds the real sets of the catalogue (``real/__init__.py`` shows the folder), a tokenizer and the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.errors import DataError, did_you_mean
from data_pipelines.io import publish
from data_pipelines.recipes.jsonl import read_jsonl, write_jsonl
from data_pipelines.recipes.manifest import write_manifest
from data_pipelines.recipes.parts import Counts, Progress, build_part, built_counts
from data_pipelines.recipes.real import captions, detection, language_tasks, ocr, questions, text
from data_pipelines.recipes.real.catalogue import SETS, TASKS, Options, RealSet, Recipe
from data_pipelines.recipes.real.manifest import LICENCES, VERSION, Built, made_samples, make_manifest
from data_pipelines.recipes.real.packages import PackageStore
from data_pipelines.recipes.shard_writer import read_captions
from data_pipelines.recipes.tokenizer import train_tokenizer

RECIPES: dict[str, Recipe] = {
    **captions.RECIPES,
    **detection.RECIPES,
    **language_tasks.RECIPES,
    **ocr.RECIPES,
    **questions.RECIPES,
    **text.RECIPES,
}


def build_real_sets(
    out_dir: str | Path,
    *,
    sets: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    vocabulary: int = 8192,
    packages: PackageStore | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Fetches packages and builds the named sets from them (None = all but those built on demand only).

    Args:
      out_dir: folder of the sets. Sets that an earlier call built with the same arguments are kept.
      sets: names from the catalogue.
      seed: determines composed samples.
      limit: maximum number of samples per set.
      vocabulary: number of tokenizer pieces, without the added tokens.
      packages: where packages come from; by default they are fetched into ``out_dir/packages``.
      progress: called with one line for each set and licence.

    Returns {"sets": {NAME: {"stage", "counts", "licences"}}, "failed": {NAME: why}, "manifest": path}. The manifest
    covers every training set in ``out_dir``, including those of earlier calls; None if there is no training set.

    Raises:
      DataError: an unknown set name, or invalid arguments.
    """
    by_name = {real_set.name: real_set for real_set in SETS}
    for name in sets or ():
        if name not in by_name:
            raise DataError(f"unknown set {name!r}; {did_you_mean(name, by_name)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: at least 1, or leave it out")
    root, options = Path(out_dir), Options(seed, limit)
    store = packages or PackageStore(root / "packages")
    finished: dict[str, Any] = {}
    failed: dict[str, str] = {}
    default = [real_set.name for real_set in SETS if not real_set.on_demand]
    for real_set in (by_name[name] for name in dict.fromkeys(default if sets is None else sets)):
        try:
            finished[real_set.name] = _build_set(root, real_set, options, store, progress)
        except (DataError, OSError) as error:
            failed[real_set.name] = str(error)
        except Exception as error:  # an unexpectedly structured package must not stop the other sets
            failed[real_set.name] = f"its packages cannot be read ({type(error).__name__}: {error})"
        if real_set.name in failed:
            progress(f"{real_set.stage}/{real_set.name}: FAILED: {failed[real_set.name]}")
    _finish(root, seed, vocabulary, progress)
    manifest = root / "manifest.json"
    return {"sets": finished, "failed": failed, "manifest": str(manifest) if manifest.is_file() else None}


def _build_set(
    root: Path, real_set: RealSet, options: Options, store: PackageStore, progress: Progress
) -> dict[str, Any]:
    """Nothing is downloaded for a set that has already been built."""

    def write(folder: Path) -> Counts:
        roots = [store.unpacked(package) for package in real_set.packages]
        counts = RECIPES[real_set.name](options, folder, roots)
        if not made_samples(counts):
            raise DataError("its packages contain nothing of the expected form")
        licences = {str(package): store.licence(package) for package in real_set.packages}
        (folder / LICENCES).write_text(json.dumps(licences, indent=1))
        return counts

    name = f"{real_set.stage}/{real_set.name}"
    packages = [str(package) for package in real_set.packages]
    settings = {"version": real_set.version, "packages": packages, **dataclasses.asdict(options)}
    counts = build_part(root, name, settings, write, progress)
    licences = json.loads((root / name / LICENCES).read_text())
    for package, licence in licences.items():
        progress(f"  licence of the {package}: {licence}")
    return {"stage": real_set.stage, "counts": counts, "licences": licences}


def _built(root: Path) -> Built:
    """The sets that models train on: tasks do not belong to the tokenizer's text."""
    built: Built = {}
    for real_set in SETS:
        if real_set.stage == TASKS:
            continue
        counts = built_counts(root / real_set.stage / real_set.name)
        if counts is not None:
            built.setdefault(real_set.stage, {})[real_set.name] = counts
    return built


def _finish(root: Path, seed: int, vocabulary: int, progress: Progress) -> None:
    """Writes tokenizer, held-out text and captions, and manifest of the sets that have been built."""
    built = _built(root)
    if not built:
        return
    settings = {"version": VERSION, "sets": built, "vocabulary": vocabulary}
    sentences = _sentences(root, built)
    build_part(root, "tokenizer", settings, lambda folder: train_tokenizer(folder, sentences, vocabulary), progress)
    beginnings = [(root / f"text/{name}/heldout.txt").read_bytes()[:100_000] for name in sorted(built.get("text", {}))]
    heldout = b"\n".join(beginning[: beginning.rfind(b"\n") + 1] for beginning in beginnings)
    publish.write_bytes(root / "heldout/text.txt", heldout)
    write_jsonl(root / "heldout/captions.jsonl", _heldout_captions(root, built))
    write_manifest(root, make_manifest(root, built, seed))


def _heldout_captions(root: Path, built: Built) -> Iterator[dict[str, Any]]:
    """Held-out pairs of the sets with good captions; picture paths are relative to the root of all sets."""
    for name in sorted(built.get("s1_2", {})):
        for record in read_jsonl(root / f"s1_2/{name}/heldout.jsonl"):
            image = f"s1_2/{name}/images/{record['image']}"
            yield record | {"id": f"{name}_{record['id']}", "image": image, "kind": name}


def _sentences(root: Path, built: Built) -> Iterator[str]:
    """Some megabytes of every text, every caption, and the turns of conversations."""
    names = {stage: sorted(sets) for stage, sets in built.items()}
    for name in names.get("text", ()):
        with (root / f"text/{name}/train.txt").open(encoding="utf-8", errors="ignore") as file:
            yield from (line.rstrip("\n") for line in file.readlines(4_000_000) if line.strip())
    for name in names.get("s1_1", ()):
        yield from read_captions(root / f"s1_1/{name}")
    for name in names.get("s1_2", ()):
        yield from (record["caption"] for record in read_jsonl(root / f"s1_2/{name}/captions.jsonl"))
    for name in names.get("s2", ()):
        for record in read_jsonl(root / f"s2/{name}/train.jsonl"):
            yield from (turn["value"] for turn in record["conversations"])
    yield from ["user", "assistant", "system", CAPTION_PROMPT] * 1000
