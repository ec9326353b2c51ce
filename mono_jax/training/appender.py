"""Append-only files on disks that may be full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]


class Appender:
    """Appends complete entries to a file; entries that cannot be written wait for the next ``write``."""

    def __init__(self, path: Path, what: str, warn: Say):
        self.path, self._what, self._warn = path, what, warn
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, entry: bytes) -> None:
        """Never raises: the first of consecutive failures is reported, and the file is truncated to its complete
        entries."""
        self._waiting.append(entry)
        try:
            self._append(b"".join(self._waiting))
            self._waiting, self._warned = [], False
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"{self.path}: {self._what} cannot be written ({error.strerror or error}); keeping them and "
                    "trying again later"
                )
            self._warned = True

    def _append(self, data: bytes) -> None:
        # Reopened each time, because the file may have been replaced or its disk remounted.
        with self.path.open("ab", buffering=0) as file:
            try:
                file.truncate(self._size)
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._size)
                raise
        self._size += len(data)

    def close(self) -> None:
        """Tries a last time; reports what is lost."""
        if self._waiting:
            waiting, self._warned = len(self._waiting), True
            self.write(b"")
            if self._waiting:
                self._warn(f"{self.path}: {waiting} entries of {self._what} are not written")
