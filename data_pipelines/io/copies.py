"""Whole files between the local disk and remote storage: copies for readers that need local files, and writing."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from data_pipelines.io import paths, publish
from data_pipelines.io.digests import digest
from data_pipelines.io.processes import locked
from data_pipelines.io.storage import storage


def local_copy(path: str) -> str:
    """A remote file's copy in the cache folder, made once, for readers that need a local file; a local path unchanged.

    Raises StorageError.
    """
    if not paths.is_remote(path):
        return paths.local_path(path)
    place = paths.cache_dir() / "copies" / f"{digest(path, paths.stamp(path))[:16]}-{paths.basename(path)}"
    _copy(path, place)
    return str(place)


def local_folder(path: str, names: Collection[str] | None = None) -> str:
    """Like ``local_copy``, for the files in a folder (only those in ``names``, if given), which keep their names."""
    if not paths.is_remote(path):
        return paths.local_path(path)
    files = [file for file in paths.list_dir(path) if names is None or file[0] in names]
    folder = paths.cache_dir() / "copies" / digest(path, *(f"{name} {mark}" for name, _, mark in files))[:16]
    for name, _, _ in files:
        _copy(paths.join(path, name), folder / name)
    return str(folder)


def _copy(url: str, place: Path) -> None:
    """Fetches a remote file unless it already exists. Raises StorageError."""
    with storage(str(place), "free some space, or set MONO_JAX_CACHE"):
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(f"{place.name}.lock")):  # one process at a time
            if not place.exists():
                with publish.new_file(place) as file, paths.remote(url) as (fs, inner):
                    fs.get_file(inner, str(file))


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file to a path or URL; a local file appears whole or not at all.

    Raises OSError, also if the location is read-only.
    """
    if paths.is_remote(path):
        fs, inner = paths.filesystem(path)
        try:
            fs.pipe_file(inner, data)
        except Exception as error:  # file systems that cannot write raise NotImplementedError, HTTP errors and more
            raise OSError(f"{path}: {error}") from None
        return
    publish.write_bytes(Path(paths.local_path(path)), data)


def copy_to(source: str, target: str) -> None:
    """Copies a local file of any size to a path or URL; a local target appears whole or not at all. Raises OSError."""
    if paths.is_remote(target):
        fs, inner = paths.filesystem(target)
        fs.put_file(source, inner)
        return
    with publish.new_file(Path(paths.local_path(target))) as file:
        shutil.copyfile(source, file)
