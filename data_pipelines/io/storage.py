"""Files by path or URL (anything fsspec opens): globs, random access reads, stamps of content, atomic writes."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import glob
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import DataError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*(::|://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
# What file systems tell about a file's content; the times only where there is nothing better, since a listing and a
# look at the single file may give them in different precision.
_CONTENT_MARKS = frozenset(["etag", "md5hash", "crc32c", "generation", "uid"])
_TIME_MARKS = frozenset(["mtime", "created", "updated", "last-modified", "lastmodified", "last_modified"])
_OPEN_FILES = 256  # file descriptors or remote handles kept open per process
_RETRY_SECONDS = (1.0, 5.0)  # waits before a remote read is tried again; file systems have retries of their own
_STALE_SECONDS = 86_400  # after which a temporary file counts as left by a killed process
_GAP = 1 << 16  # bytes between two wanted places of a remote file that are rather read than asked around


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


@contextlib.contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """As ``filesystem``, while whatever the file system raises becomes a DataError."""
    try:
        yield filesystem(url)
    except DataError:
        raise
    except Exception as error:  # file systems raise kinds of their own
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{url}: {reason}; check the address, your credentials and the network") from None


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
        spelled = list(_expand_braces(os.fspath(pattern)))
        if len(spelled) > 1 and is_remote(spelled[0]):
            for folder in {parent(path) for path in spelled}:
                with contextlib.suppress(DataError):  # a web server need not list its folders
                    list_dir(folder)  # which the file system keeps: no request for each single path
        for path in spelled:
            matches = _glob(path)
            if not matches:
                raise DataError(f"{path}: no such file or folder; check the paths of this source")
            found.update(dict.fromkeys(matches))
    return list(found)


def _glob(path: str) -> list[str]:
    if is_remote(path):
        with _remote(path) as (fs, inner):
            if any(c in inner for c in "*?["):
                return sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
            return [path] if fs.exists(inner) else []
    path = local_path(path)
    if os.path.exists(path):  # first, so that a name with brackets in it is found as it stands
        return [path]
    return sorted(glob.glob(path, recursive=True))


def exists(path: str) -> bool:
    return bool(_glob(path)) if is_remote(path) else os.path.exists(local_path(path))


def is_dir(path: str) -> bool:
    if is_remote(path):
        with _remote(path) as (fs, inner):
            return fs.isdir(inner)
    return os.path.isdir(local_path(path))


def list_dir(path: str) -> list[tuple[str, int, str]]:
    """(name, bytes, mark that changes with the content) of the files in a folder, sorted by name; no folders.

    Raises DataError if the folder cannot be listed.
    """
    if is_remote(path):
        with _remote(path) as (fs, inner):
            entries = [entry for entry in fs.ls(inner, detail=True) if entry["type"] == "file"]
        return sorted((basename(e["name"]), int(e["size"] or 0), _marks(e)) for e in entries)
    try:
        with os.scandir(local_path(path) or ".") as found:
            files = [(entry.name, entry.stat()) for entry in found if entry.is_file()]
            return sorted((name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}") for name, status in files)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror or error})") from None


def walk(path: str) -> list[str]:
    """Sorted paths of the folders at and below ``path`` that hold files; hidden ones are left out."""
    if is_remote(path):
        with _remote(path) as (fs, inner):
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

    Raises DataError if the file is missing or unreadable: a local one on opening, a remote one when its size is asked.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd = -1
        if is_remote(path):
            self._fs, self._inner = filesystem(path)
            return
        try:
            self._fd = os.open(local_path(path), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)

    @functools.cached_property
    def size(self) -> int:
        try:
            return os.fstat(self._fd).st_size if self._fd >= 0 else int(self._fs.size(self._inner))
        except Exception as error:  # remote file systems raise kinds of their own
            raise DataError(f"{self.path}: cannot be opened ({error})") from None

    @functools.cached_property
    def mark(self) -> str:
        """As ``stamp``, taken once."""
        return stamp(self.path)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end of the file. Raises OSError."""
        if self._fd >= 0:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more  # one call returns at most 2 GiB, and less on some network file systems
            return data
        if length <= 0:
            return b""
        return self.fetch(offset, offset + length) if _chunks is None else _chunks.read(self, offset, length)

    def read_all(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """What ``read`` gives for each (offset, length). Neighbours in a remote file come in one request."""
        if self._fd >= 0:
            return [self.read(*place) for place in places]
        found: dict[tuple[int, int], bytes] = {}
        run: list[tuple[int, int]] = []
        for place in [*sorted(places), None]:
            end = max((offset + length for offset, length in run), default=0)
            if run and (place is None or place[0] > end + _GAP):
                start = run[0][0]
                data = self.read(start, end - start)
                found.update(((offset, n), data[offset - start : offset - start + n]) for offset, n in run)
                run = []
            if place is not None:
                run.append(place)
        return [found[place] for place in places]

    def fetch(self, start: int, stop: int | None) -> bytes:
        """Bytes ``start`` to ``stop`` (None: the end) of a remote file by one request, tried again if it fails.

        Raises OSError.
        """
        for wait in (*_RETRY_SECONDS, None):
            try:
                data = self._fs.cat_file(self._inner, start=start or None, end=stop)
            except (FileNotFoundError, PermissionError) as error:
                raise OSError(f"{self.path}: {error}") from None
            except Exception as error:  # file systems raise kinds of their own
                if start and start >= self.size:
                    return b""
                if wait is None:
                    raise OSError(f"{self.path}: {type(error).__name__}: {error}") from None
                time.sleep(wait)
            else:
                fits = stop is None or len(data) <= stop - start
                return data if fits else data[start:stop]  # a server that knows no ranges gives the whole file
        raise AssertionError("not reached")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keeps out other threads and processes of this machine."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has the file open too


class _ChunkCache:
    """Aligned pieces of remote files in a folder of the local disk, shared by all processes of the machine.

    A piece is fetched by one of them, while others that want it wait. The ones not used for longest make room. On a
    disk that is full or read-only nothing is kept, and everything is fetched each time.
    """

    CHUNK = 1 << 23
    LOCKS = 64

    def __init__(self, folder: Path, limit: int):
        """limit: bytes kept in ``folder``, which is made if missing."""
        self._folder, self.limit = folder, limit
        self._warned = False
        with self._dispensable():
            (folder / "locks").mkdir(parents=True, exist_ok=True)

    def read(self, blob: Blob, offset: int, length: int) -> bytes:
        parts, position = [], offset
        while position < offset + length:
            number, start = divmod(position, self.CHUNK)
            wanted = min(self.CHUNK - start, offset + length - position)
            parts.append(self._piece(blob, number, start, wanted))
            if len(parts[-1]) < wanted:  # the file's end
                break
            position += wanted
        return b"".join(parts)

    def _piece(self, blob: Blob, number: int, start: int, length: int) -> bytes:
        name = f"{digest(blob.path, blob.mark)}-{number}"
        place = self._folder / name
        with contextlib.suppress(OSError):
            return self._of(place, start, length)
        with contextlib.ExitStack() as stack:
            with self._dispensable():
                stack.enter_context(_locked(self._folder / "locks" / str(int(name[:4], 16) % self.LOCKS)))
            with contextlib.suppress(OSError):  # another process was quicker
                return self._of(place, start, length)
            data = blob.fetch(number * self.CHUNK, (number + 1) * self.CHUNK)
            with self._dispensable():
                self._make_room()
                write_bytes(str(place), data)
        return data[start : start + length]

    @contextlib.contextmanager
    def _dispensable(self) -> Iterator[None]:
        """What fails here costs the cache alone, and is told once."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning("%s: remote data is not kept there (%s)", self._folder, error)
            self._warned = True

    def _of(self, place: Path, start: int, length: int) -> bytes:
        with place.open("rb", buffering=0) as file:
            with contextlib.suppress(OSError):  # read-only
                os.utime(place)  # used now
            return os.pread(file.fileno(), length, start)

    def _make_room(self) -> None:
        pieces = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                if entry.is_file() and not entry.name.endswith(".tmp"):  # which another process is writing
                    status = entry.stat()
                    pieces.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in pieces)
        for _, size, path in sorted(pieces):
            if total + self.CHUNK <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


_chunks: _ChunkCache | None = None


def cache_remote(gigabytes: float) -> None:
    """Lets this process read remote files in pieces that are kept in the cache folder, up to so many bytes in all.

    Of several calls the largest limit counts.
    """
    global _chunks
    limit = int(gigabytes * 1e9)
    if _chunks is None or limit > _chunks.limit:
        _chunks = _ChunkCache(cache_dir() / "remote", limit)


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


def local_copy(path: str) -> str:
    """A remote file's copy in the cache folder, made once, for readers that need a local file; a local path as it is.

    Raises DataError.
    """
    if not is_remote(path):
        return local_path(path)
    with _remote(path):
        place = cache_dir() / "copies" / f"{digest(path, stamp(path))[:16]}-{basename(path)}"
        _copy(path, place)
    return str(place)


def local_folder(path: str) -> str:
    """As ``local_copy``, of the files in a folder, which keep their names."""
    if not is_remote(path):
        return local_path(path)
    files = list_dir(path)
    folder = cache_dir() / "copies" / digest(path, *(f"{name} {mark}" for name, _, mark in files))[:16]
    for name, _, _ in files:
        _copy(join(path, name), folder / name)
    return str(folder)


def _copy(url: str, place: Path) -> None:
    """Fetches a remote file unless it is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _remote(url) as (fs, inner), _locked(place.with_name(f"{place.name}.lock")):  # one process, the others wait
        if not place.exists():
            temporary = temporary_beside(place)
            fs.get_file(inner, str(temporary))
            temporary.replace(place)


class ScanView:
    """One pass over a file in (mostly) increasing order of offsets, as an indexer makes it; buffered, never mapped.

    ``size`` is that of the file.
    """

    def __init__(self, path: str, file: Any, size: int):
        self._path, self._file, self.size = path, file, size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end of the file. Raises DataError."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            self._file.seek(offset)
            return self._file.read(length)
        except Exception as error:  # file systems raise kinds of their own
            raise DataError(f"{self._path}: cannot be read ({type(error).__name__}: {error})") from None


@contextlib.contextmanager
def scan_view(path: str) -> Iterator[ScanView]:
    """A view of a whole file. Raises DataError if it cannot be opened."""
    if is_remote(path):
        with _remote(path) as (fs, inner):
            file = fs.open(inner, "rb", block_size=1 << 24, cache_type="readahead")
        with file:
            yield ScanView(path, file, int(file.size))
        return
    try:
        file = open(local_path(path), "rb", buffering=1 << 18)  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    with file:
        yield ScanView(path, file, os.fstat(file.fileno()).st_size)


def _marks(info: Mapping[str, Any]) -> str:
    found = {key.lower(): str(value) for key, value in info.items() if value is not None}
    marks = _CONTENT_MARKS & found.keys() or _TIME_MARKS & found.keys()
    return repr(sorted((key, found[key]) for key in {"size", *marks} & found.keys()))


def stamp(path: str) -> str:
    """Changes when the file does: size and time of change (local), the file system's marks of content (remote).

    Raises OSError.
    """
    if is_remote(path):
        fs, inner = filesystem(path)
        try:
            return _marks(fs.info(inner))
        except OSError:
            raise
        except Exception as error:  # file systems raise kinds of their own
            raise OSError(f"{path}: {error}") from None
    status = os.stat(local_path(path))
    return f"{status.st_size}:{status.st_mtime_ns}"


def read_bytes(path: str, limit: int | None = None) -> bytes:
    """The whole file, or its first ``limit`` bytes. Raises DataError if it is missing or cannot be read."""
    if not is_remote(path):
        handle = Blob(path)
        return handle.read(0, handle.size if limit is None else min(limit, handle.size))
    try:
        return Blob(path).fetch(0, limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def ahead(function: Callable[..., T], calls: Iterable[tuple], threads: int) -> Iterator[concurrent.futures.Future[T]]:
    """Futures of ``function(*call)`` in order, begun by threads that mostly wait for remote storage.

    So many are begun ahead, four a thread, that the number of calls does not matter for memory.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        for call in calls:
            waiting.append(pool.submit(function, *call))
            if len(waiting) == 4 * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def temporary_beside(place: Path) -> Path:
    """A name that nobody else takes; process numbers repeat where containers share a folder."""
    return place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")


def remove_stale(folder: Path) -> None:
    """Removes temporary files and folders that killed processes left: those that nobody has written to for a day."""
    for entry in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process removed it
            latest = max(file.stat().st_mtime for file in (entry, *entry.glob("*")))
            if time.time() - latest > _STALE_SECONDS:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


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
    temporary = temporary_beside(target)
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
    temporary = temporary_beside(place)
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


class Digest:
    """A 128-bit hash of parts that are added one by one; their borders count."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, part: bytes | str) -> None:
        data = part.encode() if isinstance(part, str) else part
        self._state.update(len(data).to_bytes(8, "little"))
        self._state.update(data)

    def hex(self) -> str:
        """32 hex digits."""
        return self._state.hexdigest()


def digest(*parts: bytes | str) -> str:
    """The ``Digest`` of several parts."""
    result = Digest()
    for part in parts:
        result.add(part)
    return result.hex()
