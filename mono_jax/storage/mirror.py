"""Small files of a workdir in a bucket: a local folder that mirrors them, fetched at the start and stored as it grows.

Files that a run appends to or replaces remain local files: config.json, metrics.jsonl, timeline.jsonl, TensorBoard's
events, logs, reports. If both differ at the start, the bucket is right: what a killed run wrote after the last ``push``
is not covered by a checkpoint either. With several processes, each has its own folder and stores what it changed
itself.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from mono_jax.storage.objects import ObjectPath


class Mirror:
    """``files`` mirrors the folder ``place`` without its folders ``large``."""

    def __init__(self, place: ObjectPath, files: Path, large: Sequence[str]):
        """``large``: names, relative to ``place``, of folders that are neither fetched nor stored."""
        self.place, self.files, self._large = place, files, large
        self._known: dict[str, tuple[int, int]] = {}  # size and modification time of files that both have
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Makes the local folder a copy of the bucket's content. Raises StorageError, OSError."""
        with self._lock:
            shutil.rmtree(self.files, ignore_errors=True)
            self.files.mkdir(parents=True)
            for name in self.stored():
                (self.place / name).fetch(self.files / name)
                self._known[name] = _mark(self.files / name)

    def push(self) -> None:
        """Stores local changes, and removes from the bucket what no longer exists locally. Raises StorageError,
        OSError."""
        with self._lock:
            present = {}
            for file in self.files.rglob("*"):
                if file.is_file() and not _is_hidden(name := file.relative_to(self.files).as_posix()):
                    present[name] = file
            for name, file in present.items():
                if self._known.get(name) != (mark := _mark(file)):
                    (self.place / name).write_bytes(file.read_bytes())
                    self._known[name] = mark  # taken before the copy: later changes are stored the next time
            for name in self._known.keys() - present.keys():
                (self.place / name).unlink(missing_ok=True)
                del self._known[name]

    def stored(self) -> list[str]:
        """Names in the bucket."""
        return [name for name in self.place.objects(self._large) if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    """Whether it is not one of the run's files: a lock, or a file that is still being written."""
    return name.rpartition("/")[2].startswith(".") or name.endswith(".tmp")


def _mark(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
