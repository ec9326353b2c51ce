"""Places for files (local folders, and gs:// and s3:// URLs), and operations that work on both."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from data_pipelines.io.digests import digest
from data_pipelines.io.paths import cache_dir
from data_pipelines.io.processes import locked
from mono_jax.storage.buckets import in_threads
from mono_jax.storage.objects import ObjectPath

Place = Path | ObjectPath
_AT_A_TIME = 4  # files copied concurrently


def place_of(text: str | Place) -> Place:
    """The place that a path or URL names. Raises ConfigError for a URL that is neither gs://, s3:// nor file://."""
    if isinstance(text, Path | ObjectPath):
        return text
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return ObjectPath(text) if "://" in text else Path(text)


def write_bytes(target: Place, data: bytes) -> None:
    """Writes a file atomically, with missing local parent folders. Raises OSError or StorageError."""
    if isinstance(target, ObjectPath):
        target.write_bytes(data)
    else:
        publish.write_bytes(target, data)


def write_text(target: Place, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(target, text.encode())


def write_json(target: Place, value: Any) -> None:
    """``write_bytes`` of ``value`` as indented JSON with a final newline."""
    write_text(target, publish.json_text(value))


def remove_tree(folder: Place) -> None:
    """Removes a folder with all its contents; in a local one, whatever can be removed."""
    if isinstance(folder, ObjectPath):
        folder.remove_below()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy_file(source: Place, target: Place) -> None:
    """Copies a (small) file; does nothing if both are the same."""
    if isinstance(source, Path) and isinstance(target, Path):
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    elif source != target:
        write_bytes(target, source.read_bytes())


def upload(folder: Path, target: ObjectPath, last: Sequence[str]) -> None:
    """Copies all files of a local folder; those named ``last`` come last, so that once they exist, the rest does,
    too."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    for group in (set(names) - set(last), set(names) & set(last)):
        in_threads(lambda name: copy_file(folder / name, target / name), sorted(group), _AT_A_TIME)


def local_copy(folder: Place, names: Iterable[str]) -> Path:
    """A local folder with the files ``names`` of ``folder``: the folder itself, or a copy in the cache folder.

    Files that were fetched before and have not changed since are not fetched again. Raises StorageError, OSError.
    """
    if isinstance(folder, Path):
        return folder
    target = cache_dir() / "models" / digest(str(folder))[:16] / (folder.name or folder.bucket)
    target.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(".lock")):  # one process per machine at a time
        known_file = target.with_name("generations.json")
        known = json.loads(known_file.read_text()) if known_file.is_file() else {}
        old = [name for name in names if known.get(name) and (target / name).is_file()]
        changed = [name for name in names if name not in old or not (folder / name).is_still(known[name])]
        if changed:
            print(f"fetching {len(changed)} files of {folder} to {target}", file=sys.stderr, flush=True)
        for name in changed:
            known[name] = (folder / name).fetch(target / name)
            publish.write_json(known_file, known)
        for gone in {file.name for file in target.iterdir()} - set(names):
            (target / gone).unlink()
    return target
