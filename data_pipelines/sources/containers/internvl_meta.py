"""InternVL's meta files and LLaVA-OneVision's YAML mixes, both of which list annotation files.

InternVL: {NAME: {"root", "annotation" (a path or several), "repeat_time", "data_augment", "max_dynamic_patch"}}.
LLaVA-OneVision: {"datasets": [{"json_path", "sampling_strategy"}]}, a strategy being "all", "first:N", "end:N" or
"random:N", where N is a number of samples or a percentage ("10%").
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.io import blobs, paths
from data_pipelines.sources.selection.share import Share

_KEYS = ("annotation", "root", "repeat_time", "data_augment", "max_dynamic_patch", "length")
_SIGNS = frozenset(["annotation", "root", "repeat_time", "max_dynamic_patch"])  # every data set has at least one
_LIST_KEYS = ("json_path", "sampling_strategy")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One annotation file of a meta file, its paths resolved.

    Attributes:
      annotation, root: the file and the folder of its images; no root = the folder of the file.
      share: how much of it is offered.
      max_tiles: of its images, 0 = as in the config. jpeg_augment: whether its tiles are re-encoded at random.
    """

    annotation: str
    root: str | None
    share: Share
    max_tiles: int = 0
    jpeg_augment: bool = False


def meta_entries(path: str) -> list[MetaEntry] | None:
    """The annotation files that a meta file lists, or None if ``path`` is not one.

    Its relative paths are resolved from the working folder, as InternVL does, then from the meta file's own folder.
    Unknown keys and entries that are not data sets are logged. Raises DataError if an annotation is missing or a value
    is wrong.
    """
    if path.endswith((".yaml", ".yml")):
        return list(_mix(path))
    value = _read_meta(path)
    if value is None:
        return None
    return [entry for name, settings in value.items() for entry in _entries(path, name, settings)]


def _entries(path: str, name: str, settings: Any) -> Iterator[MetaEntry]:
    if not isinstance(settings, Mapping) or name.startswith("_"):
        _log.warning("%s: %r is not a data set (it has no annotation): left out", path, name)
        return
    if "annotation" not in settings:
        raise DataError(f"{path}: {name!r} has no annotation; its keys: {', '.join(settings) or 'none'}")
    for key in settings.keys() - set(_KEYS):
        _log.warning("%s: unknown key %r of %r is ignored; %s", path, key, name, did_you_mean(key, _KEYS))
    times, tiles = settings.get("repeat_time", 1), settings.get("max_dynamic_patch") or 0
    if isinstance(times, bool) or not isinstance(times, int | float) or not times > 0:
        raise DataError(f"{path}: repeat_time of {name!r} must be a positive number, got {times!r}")
    if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 0:
        raise DataError(f"{path}: max_dynamic_patch of {name!r} must be a positive integer, got {tiles!r}")
    augment = settings.get("data_augment")
    if not isinstance(augment, bool | None):
        raise DataError(f"{path}: data_augment of {name!r} must be true or false, got {augment!r}")
    files = settings["annotation"]
    if not files:
        raise DataError(f"{path}: annotation of {name!r} is empty: {files!r}")
    for file in files if isinstance(files, list) else [files]:
        annotation = _resolve(path, str(file))
        if not paths.exists(annotation):
            raise DataError(f"{path}: annotation of {name!r} not found: {file}")
        root = _resolve(path, str(settings.get("root") or ""))
        if not paths.is_remote(root) and not paths.exists(root):
            _log.warning("%s: root of %r not found: %s", path, name, root)
        yield MetaEntry(annotation, root, Share(float(times)), tiles, bool(augment))


def _resolve(meta: str, path: str) -> str:
    if paths.is_remote(meta) or not paths.exists(path):
        return paths.join(paths.parent(meta), path) if path else paths.parent(meta)
    return path


def _read_meta(path: str) -> dict[str, Any] | None:
    if not path.endswith(".json"):
        return None
    with blobs.scan_view(path) as view:
        if view.size > 1 << 24 or view.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            return None
        try:
            value = json.loads(view.read(0, view.size))
        except (ValueError, RecursionError):
            return None  # JSONL that happens to be named .json
    entries = list(value.values()) if isinstance(value, dict) else []
    listed = [entry for entry in entries if isinstance(entry, dict)]
    only_sets = bool(listed) and len(listed) == len(entries) and not any(_SIGNS.isdisjoint(entry) for entry in listed)
    return value if only_sets or any("annotation" in entry for entry in listed) else None


def _mix(path: str) -> Iterator[MetaEntry]:
    """The files of a YAML mix; their images are in the files' own folders, unless the source has an image_root."""
    import yaml

    try:
        value = yaml.safe_load(blobs.read_bytes(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    listed = value.get("datasets") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "json_path" in each for each in listed):
        raise DataError(f"{path}: not a mix: 'datasets' must list objects with 'json_path'")
    for each in listed:
        check_keys(each, _LIST_KEYS, f"{path}: datasets")
        strategy = str(each.get("sampling_strategy") or "all")
        if not re.fullmatch(r"all|(first|end|random):\d+(\.\d+)?%?", strategy):
            raise DataError(f"{path}: sampling_strategy {strategy!r} must be all, first:N, end:N or random:N")
        for file in paths.expand(_resolve(path, str(each["json_path"]))):
            yield MetaEntry(file, None, Share(part="" if strategy == "all" else strategy))
