"""Files that only grow, on disks that may be full."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]


class Appender:
    """Appends whole entries to a file; what cannot be written waits for the next ``write``."""

    def __init__(self, path: Path, what: str, warn: Say):
        self.path, self._what, self._warn = path, what, warn
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, entry: bytes) -> None:
        """Raises nothing: the first failure in a row is reported, and the file is cut back to its whole entries."""
        self._waiting.append(entry)
        try:
            self._append(b"".join(self._waiting))
            self._waiting, self._warned = [], False
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"{self.path}: {self._what} cannot be written ({error.strerror or error}): kept, tried again"
                )
            self._warned = True

    def _append(self, data: bytes) -> None:
        # Opened anew each time: the file may have been replaced, or its disk mounted again.
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
        """A last try; reports what is lost."""
        if self._waiting:
            waiting, self._warned = len(self._waiting), True
            self.write(b"")
            if self._waiting:
                self._warn(f"{self.path}: {waiting} entries of {self._what} are not written")
