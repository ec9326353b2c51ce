"""Reading files by path or URL: random access, one pass in order, or whole."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.errors import StorageError
from data_pipelines.io import chunk_cache
from data_pipelines.io.digests import Digest
from data_pipelines.io.paths import filesystem, is_remote, local_path, remote, stamp
from data_pipelines.io.storage import patiently, storage, storage_error

_OPEN_FILES = 256  # file descriptors or remote handles kept open per process
_WHOLE, _PLACES, _PLACE = 1 << 22, 64, 1 << 14  # bytes of files digested whole, places of larger ones, bytes of each
_GAP = 1 << 16  # gap in bytes between two ranges of a remote file up to which both are read in one request


class Blob:
    """Random access to one file, safe to share between threads and across fork.

    Raises StorageError if the file is missing or unreadable: on opening if it is local, on first use if it is remote.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd = -1
        if is_remote(path):
            self._fs, self._inner = filesystem(path)
            return
        with storage(path):
            self._fd = os.open(local_path(path), os.O_RDONLY)

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)

    @functools.cached_property
    def size(self) -> int:
        try:
            return os.fstat(self._fd).st_size if self._fd >= 0 else int(self._fs.size(self._inner))
        except Exception as error:  # remote file systems raise their own exception types
            raise storage_error(self.path, error) from None

    @functools.cached_property
    def mark(self) -> str:
        """Like ``paths.stamp``, computed once."""
        return stamp(self.path)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end of the file. Raises StorageError."""
        if self._fd >= 0:
            with storage(self.path):
                data = os.pread(self._fd, length, offset)
                while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                    data += more  # one call returns at most 2 GiB, and less on some network file systems
                return data
        if length <= 0:
            return b""
        chunks = chunk_cache.current()
        return self.fetch(offset, offset + length) if chunks is None else chunks.read(self, offset, length)

    def read_all(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """What ``read`` returns for each (offset, length); neighbours in a remote file are fetched in one request."""
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
        """Bytes ``start`` to ``stop`` (None: the end) of a remote file in one request. Raises StorageError."""
        try:
            data = self._fs.cat_file(self._inner, start=start or None, end=stop)
        except Exception as error:  # file systems raise their own exception types
            if start and not isinstance(error, OSError) and start >= self.size:
                return b""
            if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):  # not an address at all
                raise StorageError(self.path, str(error), missing=True) from None
            raise storage_error(self.path, error) from None
        fits = stop is None or len(data) <= stop - start
        return data if fits else data[start:stop]  # a server without range support sends the whole file


_lock = threading.Lock()


@functools.lru_cache(maxsize=_OPEN_FILES)
def _blob(path: str, pid: int) -> Blob:
    return Blob(path)


def blob(path: str) -> Blob:
    """The process's open handle of ``path``. Least recently used handles are closed once no thread reads from them."""
    with _lock:
        return _blob(path, os.getpid())


def close_blobs() -> None:
    """Forgets all open handles (for tests, and for files that are rewritten)."""
    with _lock:
        _blob.cache_clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it at the moment of the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Positioned:
    """A seekable, read-only file object; subclasses implement ``_bytes``. ``size``: of what it reads."""

    size: int
    _position = 0

    def _bytes(self, offset: int, length: int) -> bytes:
        """``length`` bytes (at least one) from ``offset`` on, all within ``size``."""
        raise NotImplementedError

    def read(self, length: int | None = -1) -> bytes:
        """``length`` bytes, fewer at the end of the file; None or negative: all that remain."""
        left = max(0, self.size - self._position)
        length = left if length is None or length < 0 else min(length, left)
        data = self._bytes(self._position, length) if length else b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class PatientFile(Positioned):
    """A seekable file object that is reopened, and waited for, when it cannot be read.

    ``size`` is that of the file when it was opened: a file that ends earlier has been truncated since. The constructor
    and all methods that read raise StorageError.
    """

    def __init__(self, path: str, **options: Any):
        """options: for ``open`` if the file is local, for the file system's ``open`` if it is remote."""
        self._path, self._options = path, options
        self._file: Any = None
        self.closed = False
        patiently(self._opened, forget=self._forget)
        self.size = int(self._file.size) if is_remote(path) else os.fstat(self._file.fileno()).st_size

    def _opened(self) -> Any:
        if self._file is None:
            if is_remote(self._path):
                with remote(self._path) as (fs, inner):
                    self._file = fs.open(inner, "rb", **self._options)
            else:
                with storage(self._path):
                    self._file = open(local_path(self._path), "rb", **self._options)  # noqa: SIM115  see close
        return self._file

    def _forget(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
            self._file = None

    def _read(self, offset: int, length: int) -> bytes:
        file = self._opened()
        try:
            if file.tell() != offset:
                file.seek(offset)
            data = file.read(length)
        except Exception as error:  # file systems raise their own exception types
            raise storage_error(self._path, error) from None
        if len(data) < length:
            raise StorageError(self._path, f"truncated while read: {offset + len(data)} of {self.size} bytes are left")
        return data

    def _bytes(self, offset: int, length: int) -> bytes:
        return patiently(lambda: self._read(offset, length), forget=self._forget)

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        self._forget()

    def __enter__(self) -> PatientFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ScanView:
    """One pass over a file in (mostly) increasing order of offsets, for indexing; buffered, never memory-mapped.

    ``size`` is the size of the file.
    """

    def __init__(self, file: PatientFile):
        self._file, self.size = file, file.size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, fewer at the end of the file. Raises StorageError."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        self._file.seek(offset)
        return self._file.read(length)


@contextlib.contextmanager
def scan_view(path: str) -> Iterator[ScanView]:
    """A view of a whole file. Raises StorageError if it cannot be opened."""
    options = {"block_size": 1 << 24, "cache_type": "readahead"} if is_remote(path) else {"buffering": 1 << 18}
    with PatientFile(path, **options) as file:
        yield ScanView(file)


def open_file(path: str) -> PatientFile:
    """A seekable file object, for libraries that expect one. Raises StorageError if it cannot be opened."""
    return PatientFile(path)


def read_bytes(path: str, limit: int | None = None) -> bytes:
    """The whole file, or its first ``limit`` bytes. Raises StorageError if it is missing or cannot be read."""
    handle = Blob(path)
    if is_remote(path):
        return handle.fetch(0, limit)
    size = handle.size if limit is None else min(limit, handle.size)
    data = handle.read(0, size)
    if len(data) < size:
        raise StorageError(path, f"truncated while read: {len(data)} of {size} bytes are left")
    return data


def content_mark(path: str) -> str:
    """A mark of a local file's content that is cheap to compute: from all of a small file, and from the size and 64
    places between beginning and end of a larger one. Empty for a remote file. Raises StorageError.
    """
    if is_remote(path):
        return ""  # its stamp already marks its content
    handle, result = Blob(path), Digest()
    result.add(str(handle.size))
    if handle.size <= _WHOLE:
        result.add(handle.read(0, handle.size))
    else:
        for number in range(_PLACES):
            result.add(handle.read((handle.size - _PLACE) * number // (_PLACES - 1), _PLACE))
    return result.hex()
