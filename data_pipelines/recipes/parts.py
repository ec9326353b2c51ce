"""The parts of a folder of sets: each is built once, depends only on its settings, and appears when it is complete."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.io import publish

Counts = dict[str, int]
Progress = Callable[[str], None]


def sample_rng(seed: int, part: str, index: int = 0) -> np.random.Generator:
    """The generator of one sample, independent of the number and order of the other samples."""
    digest = hashlib.blake2b(part.encode(), digest_size=4).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), index])


def build_part(
    root: Path, name: str, settings: Mapping[str, Any], write: Callable[[Path], Counts], progress: Progress
) -> Counts:
    """Builds the folder ``root/name``; ``write`` fills the temporary folder passed to it.

    A part that an earlier call built with equal ``settings`` is kept. Returns the counts from ``write``.
    """
    folder = root / name
    counts = built_counts(folder, settings)
    if counts is not None:
        return counts
    start = time.monotonic()
    publish.remove_stale(folder.parent)
    with publish.new_folder(folder, replace=True) as temporary:
        counts = write(temporary)
        (temporary / "part.json").write_text(json.dumps({"settings": settings, "counts": counts}))
    progress(f"{name}: {', '.join(f'{n} {what}' for what, n in counts.items())} in {time.monotonic() - start:.1f} s")
    return counts


def built_counts(folder: Path, settings: Mapping[str, Any] | None = None) -> Counts | None:
    """Counts of the part in ``folder``; None if it is not built, or not with ``settings`` (None = any), or damaged."""
    file = folder / "part.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        counts = dict(record["counts"])
        return counts if settings is None or record["settings"] == settings else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def skip_counts(skipped: Counter[str]) -> Counts:
    """Bad samples by reason, in the form used in the counts of a part."""
    return {f"skipped ({reason})": count for reason, count in sorted(skipped.items())}
