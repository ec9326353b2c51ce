"""Files by path or URL (anything fsspec opens): globs, random access reads, stamps of content, atomic writes."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import mmap
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*(::|://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MARKS = frozenset(
    ["size", "etag", "md5hash", "crc32c", "generation", "mtime", "created", "updated", "last-modified", "lastmodified"]
)
_OPEN_FILES = 256  # file descriptors or remote handles kept open per process


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL (gs://, s3://, memory://, http://, ...); file:// counts as local."""
    return bool(_URL.match(path)) and not path.startswith("file://")


def local_path(path: str) -> str:
    """A local path with file:// and ~ resolved."""
    return os.path.expanduser(path.removeprefix("file://"))


def filesystem(url: str):
    """(fsspec file system, path within it) of a URL. Raises DataError if the protocol or its package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; install the fsspec package of this protocol") from None


def _expand_braces(pattern: str) -> Iterator[str]:
    """``{000..012}`` counts with leading zeros, ``{a,b}`` lists."""
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

    Raises DataError that names a pattern which matches nothing.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[str, None] = {}
    for pattern in paths:
        for path in _expand_braces(os.fspath(pattern)):
            matches = _glob(path)
            if not matches:
                raise DataError(f"{path}: no such file or folder; check the paths of this source")
            found.update(dict.fromkeys(matches))
    return list(found)


def _glob(path: str) -> list[str]:
    if is_remote(path):
        fs, inner = filesystem(path)
        try:
            if any(c in inner for c in "*?["):
                return sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
            return [path] if fs.exists(inner) else []
        except OSError as error:
            raise DataError(f"{path}: {error}; check the address and your credentials") from None
    path = local_path(path)
    if os.path.exists(path):  # first, so that a name with brackets in it is found as it stands
        return [path]
    return sorted(glob.glob(path, recursive=True))


def exists(path: str) -> bool:
    return bool(_glob(path)) if is_remote(path) else os.path.exists(local_path(path))


def is_dir(path: str) -> bool:
    if is_remote(path):
        fs, inner = filesystem(path)
        return fs.isdir(inner)
    return os.path.isdir(local_path(path))


def list_dir(path: str) -> list[tuple[str, int, str]]:
    """(name, bytes, mark that changes with the content) of the files in a folder, sorted by name; no folders.

    Raises DataError if the folder cannot be listed.
    """
    try:
        if is_remote(path):
            fs, inner = filesystem(path)
            entries = [entry for entry in fs.ls(inner, detail=True) if entry["type"] == "file"]
            return sorted((basename(e["name"]), int(e["size"] or 0), _marks(e)) for e in entries)
        with os.scandir(local_path(path) or ".") as found:
            files = [(entry.name, entry.stat()) for entry in found if entry.is_file()]
            return sorted((name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}") for name, status in files)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror or error})") from None


def walk(path: str) -> list[str]:
    """Sorted paths of the folders at and below ``path`` that hold files; hidden ones are left out."""
    if is_remote(path):
        fs, inner = filesystem(path)
        folders = {fs.unstrip_protocol(parent(file)) for file in fs.find(inner)}
    else:
        folders = {folder for folder, _, files in os.walk(local_path(path)) if files}
    return sorted(folder for folder in folders if not re.search(r"/\.[^/]", folder.removeprefix(path)))


def join(folder: str, name: str) -> str:
    """``folder/name``; ``name`` alone if it is absolute or a URL. An empty folder joins to ``name``."""
    if not folder or is_remote(name) or name.startswith(("/", "file://")):
        return name
    return folder.rstrip("/") + "/" + name


def parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] or ("/" if path.startswith("/") else "")


def basename(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


class Blob:
    """Random access to one file, safe to share between threads and across fork.

    Raises DataError on opening if the file is missing or unreadable.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd = -1
        try:
            if is_remote(path):
                self._fs, self._inner = filesystem(path)
                self.size = int(self._fs.size(self._inner))
            else:
                self._fd = os.open(local_path(path), os.O_RDONLY)
                self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)

    def fileno(self) -> int:
        """File descriptor of a local file."""
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end of the file."""
        if self._fd >= 0:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more  # one call returns at most 2 GiB, and less on some network file systems
            return data
        length = min(length, self.size - offset)
        return self._fs.cat_file(self._inner, start=offset, end=offset + length) if length > 0 else b""


_lock = threading.Lock()


@functools.lru_cache(maxsize=_OPEN_FILES)
def _blob(path: str, pid: int) -> Blob:
    return Blob(path)


def blob(path: str) -> Blob:
    """The process's open handle of ``path``. The least recently used ones are closed once no thread reads from them."""
    with _lock:
        return _blob(path, os.getpid())


def close_blobs() -> None:
    """Forgets all open handles (for tests, and for files that are rewritten)."""
    with _lock:
        _blob.cache_clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # it may have been held by another thread at the moment of the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def scan_view(path: str) -> Iterator[ScanView]:
    """A view of a whole file for one pass in increasing order of offsets, as an indexer makes it."""
    if is_remote(path):
        fs, inner = filesystem(path)
        try:
            with fs.open(inner, "rb", block_size=1 << 24, cache_type="readahead") as file:
                yield _RemoteView(file, int(fs.size(inner)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        return
    handle = Blob(path)
    if handle.size == 0:  # an empty file cannot be mapped
        yield _MappedView(b"")
        return
    with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield _MappedView(mapped)


class ScanView:
    """``size`` and ``read(offset, length) -> bytes`` (short at the end of the file)."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError


class _MappedView(ScanView):
    def __init__(self, data: bytes | mmap.mmap):
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class _RemoteView(ScanView):
    def __init__(self, file, size: int):
        self._file = file
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        if offset >= self.size or length <= 0:
            return b""
        self._file.seek(offset)
        return self._file.read(min(length, self.size - offset))


def _marks(info: Mapping[str, Any]) -> str:
    return repr(sorted((key, str(value)) for key, value in info.items() if key.lower() in _MARKS))


def stamp(path: str) -> str:
    """Changes when the file does: size and time of change (local), the file system's marks of content (remote)."""
    if is_remote(path):
        fs, inner = filesystem(path)
        return _marks(fs.info(inner))
    status = os.stat(local_path(path))
    return f"{status.st_size}:{status.st_mtime_ns}"


def read_bytes(path: str) -> bytes:
    """The whole file. Raises DataError if it is missing."""
    handle = Blob(path)
    return handle.read(0, handle.size)


def write_bytes(path: str, data: bytes) -> None:
    """Writes atomically (local: temporary file, then rename). Raises OSError if the place is read-only."""
    if is_remote(path):
        fs, inner = filesystem(path)
        try:
            fs.pipe_file(inner, data)
        except Exception as error:  # file systems that cannot write raise NotImplementedError, HTTP errors and more
            raise OSError(f"{path}: {error}") from None
        return
    target = Path(local_path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def copy_to(source: str, target: str) -> None:
    """Copies a local file of any size to a path or URL; a local target appears whole or not at all. Raises OSError."""
    if is_remote(target):
        fs, inner = filesystem(target)
        fs.put_file(source, inner)
        return
    place = Path(local_path(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Folder for what cannot lie beside the data: $MONO_JAX_CACHE, or mono_jax in the user's cache folder."""
    if place := os.environ.get("MONO_JAX_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mono_jax"


def digest(*parts: bytes | str) -> str:
    """128-bit hash of several parts (their borders included), as 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
