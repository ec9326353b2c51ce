"""Reading files by path or URL: random access, one pass in order, or whole."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import chunk_cache
from data_pipelines.io.paths import filesystem, is_remote, local_path, remote, stamp

_OPEN_FILES = 256  # file descriptors or remote handles kept open per process
_RETRY_SECONDS = (1.0, 5.0)  # waits before a remote read is tried again; file systems have retries of their own
_GAP = 1 << 16  # bytes between two wanted places of a remote file that are read rather than split into two requests


class Blob:
    """Random access to one file, safe to share between threads and across fork.

    Raises DataError if the file is missing or unreadable: a local one on opening, a remote one when it is used.
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
        """As ``paths.stamp``, computed once."""
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
        chunks = chunk_cache.current()
        return self.fetch(offset, offset + length) if chunks is None else chunks.read(self, offset, length)

    def read_all(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """What ``read`` gives for each (offset, length); neighbours in a remote file are fetched by one request."""
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
        """Bytes ``start`` to ``stop`` (None: the end) of a remote file in one request, which is retried if it fails.

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
        with remote(path) as (fs, inner):
            file = fs.open(inner, "rb", block_size=1 << 24, cache_type="readahead")
        with file:
            yield ScanView(path, file, int(file.size))
        return
    with open_file(path, buffering=1 << 18) as file:
        yield ScanView(path, file, os.fstat(file.fileno()).st_size)


@contextlib.contextmanager
def open_file(path: str, buffering: int = -1) -> Iterator[Any]:
    """A seekable file object, for libraries that read one; ``buffering`` of a local file is in bytes.

    Raises DataError if it cannot be opened.
    """
    try:
        if is_remote(path):
            fs, inner = filesystem(path)
            file = fs.open(inner, "rb")
        else:
            file = open(local_path(path), "rb", buffering=buffering)  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    with file:
        yield file


def read_bytes(path: str, limit: int | None = None) -> bytes:
    """The whole file, or its first ``limit`` bytes. Raises DataError if it is missing or cannot be read."""
    if not is_remote(path):
        handle = Blob(path)
        return handle.read(0, handle.size if limit is None else min(limit, handle.size))
    try:
        return Blob(path).fetch(0, limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
