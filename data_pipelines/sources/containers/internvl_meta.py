"""InternVL's meta files, which list annotation files: {NAME: {"root", "annotation", "repeat_time"}}."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import blobs, paths


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One data set of a meta file, its paths resolved; ``repeat_time``: how often, or what part of it, is offered."""

    annotation: str
    root: str
    repeat_time: float


def meta_entries(path: str) -> list[MetaEntry] | None:
    """The data sets that a meta file lists, or None if ``path`` is not one.

    Its relative paths are looked up from the working folder, as InternVL does, then from the meta file's own folder.
    Raises DataError if an annotation is missing or repeat_time is not a positive number.
    """
    value = _read_meta(path)
    if value is None:
        return None
    entries = []
    for name, entry in value.items():
        times = entry.get("repeat_time", 1)
        if not isinstance(times, int | float) or not times > 0:
            raise DataError(f"{path}: repeat_time of {name!r} must be a positive number, is {times!r}")
        annotation = _resolve(path, str(entry["annotation"]))
        if not paths.exists(annotation):
            raise DataError(f"{path}: annotation of {name!r} not found: {entry['annotation']}")
        entries.append(MetaEntry(annotation, _resolve(path, str(entry.get("root") or "")), float(times)))
    return entries


def _resolve(meta: str, path: str) -> str:
    if paths.is_remote(meta) or not paths.exists(path):
        return paths.join(paths.parent(meta), path) if path else paths.parent(meta)
    return path


def _read_meta(path: str) -> dict[str, dict[str, Any]] | None:
    if not path.endswith(".json"):
        return None
    with blobs.scan_view(path) as view:
        if view.size > 1 << 24 or view.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            return None
        try:
            value = json.loads(view.read(0, view.size))
        except ValueError:
            return None  # JSONL that happens to be named .json
    entries = list(value.values()) if isinstance(value, dict) else []
    if not entries or not all(isinstance(entry, dict) and "annotation" in entry for entry in entries):
        return None
    return value
