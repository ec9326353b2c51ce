"""Paths and URLs of files (anything fsspec opens): globs, folders, stamps of content, the cache folder."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io.storage import is_missing, patiently, storage_error

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*(://|::.*://)")  # "data::x.jpg" is a name
_BRACES = re.compile(r"\{([^{},]*,[^{}]*|\d+\.\.\d+)\}")
# What file systems report about a file's content. Times are used only where there is nothing better, since a listing
# and a query of the single file may report them with different precision.
_CONTENT_MARKS = frozenset(["etag", "md5hash", "crc32c", "generation", "uid"])
_TIME_MARKS = frozenset(["mtime", "created", "updated", "last-modified", "lastmodified", "last_modified"])


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL (gs://, s3://, memory://, http://, ...); file:// counts as local."""
    return bool(_URL.match(path)) and not path.startswith("file://")


def web_host(path: str) -> str:
    """The host of a web address (http, https); empty for other paths."""
    found = re.match(r"https?://([^/?#]+)", path) if path.startswith("http") else None
    return found.group(1).lower() if found else ""


def local_path(path: str) -> str:
    """A local path with file:// and ~ resolved."""
    return os.path.expanduser(path.removeprefix("file://"))


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path within it) of a URL. Raises DataError if the protocol or its package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; install the fsspec package of this protocol") from None


@contextlib.contextmanager
def remote(url: str) -> Iterator[tuple[Any, str]]:
    """Like ``filesystem``; whatever the file system raises becomes a StorageError."""
    try:
        yield filesystem(url)
    except DataError:
        raise
    except Exception as error:  # file systems raise their own exception types
        raise storage_error(url, error, "check the address, your credentials and the network") from None


def _expand_braces(pattern: str) -> Iterator[str]:
    """``{000..012}`` expands to a range with leading zeros, ``{a,b}`` to a list."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    body = match.group(1)
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", body):
        first, last = span.groups()
        choices: Iterable[str] = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    else:
        choices = body.split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def expand(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    """Paths and URLs matched by globs (``*``, ``**``, ``{000..127}``), sorted within each pattern.

    Raises a DataError that names a pattern that matches nothing.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[str, None] = {}
    for pattern in paths:
        pattern = os.fspath(pattern)
        literal = [] if is_remote(pattern) or "{" not in pattern else patiently(functools.partial(_glob, pattern))
        spelled = [pattern] if literal else list(_expand_braces(pattern))  # names may contain braces
        if len(spelled) > 1 and is_remote(spelled[0]):
            for folder in {parent(path) for path in spelled}:
                with contextlib.suppress(DataError):  # a web server need not list its folders
                    _list_remote(folder)  # the file system caches it, which saves a request for each single path
        for path in spelled:
            matches = patiently(functools.partial(_glob, path))
            if not matches:
                raise DataError(f"{path}: no such file or folder; check the paths of this source")
            found.update(dict.fromkeys(matches))
    return list(found)


def _glob(path: str) -> list[str]:
    if is_remote(path):
        with remote(path) as (fs, inner):
            if any(c in inner for c in "*?["):
                return sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
            return [path] if fs.exists(inner) else []
    path = local_path(path)
    if _status(path) is not None:  # checked first, so that a name with brackets is found literally
        return [path]
    return sorted(glob.glob(path, recursive=True))


def _status(path: str) -> os.stat_result | None:
    """The status of a local file or folder; None if there is none. Raises StorageError if that cannot be determined."""
    try:
        return os.stat(local_path(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        if is_missing(error) or isinstance(error, ValueError):
            return None
        raise storage_error(path, error) from None


def exists(path: str) -> bool:
    """Whether there is a file or folder. Raises StorageError if that cannot be determined."""
    if is_remote(path):
        return bool(patiently(lambda: _glob(path)))
    return patiently(lambda: _status(path)) is not None


def is_dir(path: str) -> bool:
    """Whether there is a folder. Raises StorageError if that cannot be determined."""
    if is_remote(path):
        return patiently(lambda: _is_remote_dir(path))
    found = patiently(lambda: _status(path))
    return found is not None and stat.S_ISDIR(found.st_mode)


def _is_remote_dir(url: str) -> bool:
    with remote(url) as (fs, inner):
        return fs.isdir(inner)


def list_dir(path: str) -> list[tuple[str, int, str]]:
    """(name, bytes, mark that changes with the content) of the files in a folder, sorted by name; no folders.

    Raises StorageError if the folder cannot be listed.
    """
    return patiently(lambda: _list_remote(path) if is_remote(path) else _list_local(path))


def _list_remote(url: str) -> list[tuple[str, int, str]]:
    with remote(url) as (fs, inner):
        entries = [entry for entry in fs.ls(inner, detail=True) if entry["type"] == "file"]
    return sorted((basename(e["name"]), int(e["size"] or 0), _marks(e)) for e in entries)


def _list_local(path: str) -> list[tuple[str, int, str]]:
    try:
        with os.scandir(local_path(path) or ".") as found:
            files = [(entry.name, entry.stat()) for entry in found if entry.is_file()]
            return sorted((name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}") for name, status in files)
    except OSError as error:
        raise StorageError(path, f"cannot be listed ({error.strerror or error})", is_missing(error)) from None


def walk(path: str) -> list[str]:
    """Sorted paths of the folders at and below ``path`` that contain files; hidden folders are left out.

    Raises StorageError if one of them cannot be listed.
    """
    folders = patiently(lambda: _remote_folders(path) if is_remote(path) else _local_folders(path))
    return sorted(folder for folder in folders if not re.search(r"/\.[^/]", folder.removeprefix(path)))


def _remote_folders(url: str) -> set[str]:
    with remote(url) as (fs, inner):
        return {fs.unstrip_protocol(parent(file)) for file in fs.find(inner)}


def _local_folders(path: str) -> set[str]:
    """Links to folders are followed last, so that a folder that can be reached directly keeps its own name."""
    found, seen = set(), set()
    folders, links = [local_path(path)], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link back, or to a folder that was reached directly
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir():
                        found.add(folder)
                    else:
                        (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
        except OSError as error:
            raise storage_error(os.fspath(error.filename or path), error) from None
        links.sort()
    return found


def join(folder: str, name: str) -> str:
    """``folder/name``; only ``name`` if it is absolute or a URL. An empty folder joins to ``name``."""
    if not folder or is_remote(name) or name.startswith(("/", "file://")):
        return name
    return folder.rstrip("/") + "/" + name


def parent(path: str) -> str:
    """The folder that ``path`` is in; empty if it names none."""
    return path.rstrip("/").rpartition("/")[0] or ("/" if path.startswith("/") else "")


def basename(path: str) -> str:
    """The last part of ``path``."""
    return path.rstrip("/").rpartition("/")[2]


def stamp(path: str) -> str:
    """Changes when the file does: size and modification time (local), or the file system's content marks (remote).

    Raises StorageError.
    """
    if is_remote(path):
        with remote(path) as (fs, inner):
            return _marks(fs.info(inner))
    status = _status(path)
    if status is None:
        raise StorageError(path, "no such file", missing=True)
    return f"{status.st_size}:{status.st_mtime_ns}"


def _marks(info: Mapping[str, Any]) -> str:
    found = {key.lower(): str(value) for key, value in info.items() if value is not None}
    marks = _CONTENT_MARKS & found.keys() or _TIME_MARKS & found.keys()
    return repr(sorted((key, found[key]) for key in {"size", *marks} & found.keys()))


def cache_dir() -> Path:
    """Folder for files that cannot be kept beside the data: $MONO_JAX_CACHE, or mono_jax in the user's cache folder."""
    if place := os.environ.get("MONO_JAX_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mono_jax"
