"""Pieces of remote files on the local disk, kept for long runs that read neighbouring samples."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_pipelines.io import publish
from data_pipelines.io.digests import digest
from data_pipelines.io.paths import cache_dir
from data_pipelines.io.processes import locked

_log = logging.getLogger(__name__)


class RemoteFile(Protocol):
    """What the cache needs to know about a file: its path, the mark of its content, and how to fetch it."""

    path: str

    @property
    def mark(self) -> str: ...

    def fetch(self, start: int, stop: int | None) -> bytes: ...


class ChunkCache:
    """Aligned pieces of remote files in a folder of the local disk, shared by all processes of the machine.

    A piece is fetched by one process while others that need it wait. The least recently used pieces are evicted. On a
    full or read-only disk nothing is kept, and everything is fetched each time.
    """

    CHUNK = 1 << 23
    LOCKS = 64

    def __init__(self, folder: Path, limit: int):
        """limit: bytes kept in ``folder``, which is created if missing."""
        self._folder, self.limit = folder, limit
        self._warned = False
        with self._optional():
            (folder / "locks").mkdir(parents=True, exist_ok=True)

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        parts, position = [], offset
        while position < offset + length:
            number, start = divmod(position, self.CHUNK)
            wanted = min(self.CHUNK - start, offset + length - position)
            parts.append(self._piece(file, number, start, wanted))
            if len(parts[-1]) < wanted:  # the file's end
                break
            position += wanted
        return b"".join(parts)

    def _piece(self, file: RemoteFile, number: int, start: int, length: int) -> bytes:
        name = f"{digest(file.path, file.mark)}-{number}"
        place = self._folder / name
        with contextlib.suppress(OSError):
            return self._read_kept(place, start, length)
        with contextlib.ExitStack() as stack:
            with self._optional():
                stack.enter_context(locked(self._folder / "locks" / str(int(name[:4], 16) % self.LOCKS)))
            with contextlib.suppress(OSError):  # another process was faster
                return self._read_kept(place, start, length)
            data = file.fetch(number * self.CHUNK, (number + 1) * self.CHUNK)
            with self._optional():
                self._make_room()
                publish.write_bytes(place, data)
        return data[start : start + length]

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """A failure here costs only the cache, and is logged once."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning("%s: remote data is not kept there (%s)", self._folder, error)
            self._warned = True

    def _read_kept(self, place: Path, start: int, length: int) -> bytes:
        with place.open("rb", buffering=0) as file:
            with contextlib.suppress(OSError):  # read-only
                os.utime(place)  # used now
            data = os.pread(file.fileno(), length, start)
        if len(data) < length:  # the file's end, which is rarely requested, or a damaged piece: fetched again
            raise OSError(errno.EIO, "a piece is too short", str(place))
        return data

    def _make_room(self) -> None:
        pieces = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                if entry.is_file() and not publish.is_temporary(entry.name):  # which another process is writing
                    status = entry.stat()
                    pieces.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in pieces)
        for _, size, path in sorted(pieces):
            if total + self.CHUNK <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


_current: ChunkCache | None = None


def current() -> ChunkCache | None:
    """The cache through which this process reads remote files, if enabled."""
    return _current


def enable(gigabytes: float) -> None:
    """Lets this process read remote files in pieces that are kept in the cache folder, at most ``gigabytes``.

    If called several times, the largest limit applies.
    """
    global _current
    limit = int(gigabytes * 1e9)
    if _current is None or limit > _current.limit:
        _current = ChunkCache(cache_dir() / "remote", limit)
