"""Publishing files and folders atomically: they appear at their destination whole or not at all.

Output is written under a temporary name beside its target and renamed once it is complete. A process that is killed
before that leaves the temporary name behind, which ``is_temporary`` recognises and ``remove_stale`` removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_STALE_SECONDS = 86_400  # after which a temporary file counts as left by a killed process


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name (or path) is still being written, or was left unfinished."""
    return bool(_TEMPORARY.search(name))


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it replaces ``target`` at the end, or is removed on an error.

    Missing parent folders are created. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a new temporary folder to fill; it becomes ``target`` at the end, or is removed on an error.

    Missing parent folders are created. ``replace``: whether an existing ``target`` is replaced.
    Raises OSError; FileExistsError if ``target`` is not an empty folder and may not be replaced, at the beginning or,
    if another process has created it in the meantime, at the end.
    """
    if not replace:
        _check_vacant(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        if replace and target.exists():
            _exchange(temporary, target)
        else:
            _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Writes a file atomically, creating its parent folders. Raises OSError."""
    with new_file(target) as file:
        file.write_bytes(data)


def write_text(target: Path, text: str) -> None:
    """Writes UTF-8 text atomically. Raises OSError."""
    write_bytes(target, text.encode())


def write_json(target: Path, value: Any) -> None:
    """Writes ``value`` atomically as indented JSON with a final newline. Raises OSError, TypeError."""
    write_text(target, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON with a final newline. Raises TypeError."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def remove_stale(folder: Path) -> None:
    """Removes temporary files and folders left by killed processes: those not written to for a day."""
    for entry in folder.glob("*.tmp"):
        if is_temporary(entry.name):
            with contextlib.suppress(OSError):  # another process removed it
                latest = max(file.stat().st_mtime for file in (entry, *entry.glob("*")))
                if time.time() - latest > _STALE_SECONDS:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _temporary(target: Path) -> Path:
    """A unique name; process ids are not sufficient, since they repeat where containers share a folder."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")


def _check_vacant(target: Path) -> None:
    if target.is_dir():
        with os.scandir(target) as entries:
            vacant = next(entries, None) is None
    else:
        vacant = not target.exists()
    if not vacant:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _move(folder: Path, target: Path) -> None:
    try:
        os.replace(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        raise


def _exchange(folder: Path, target: Path) -> None:
    """Puts ``folder`` in the place of ``target``, which is removed only afterwards."""
    old = _temporary(target)
    os.replace(target, old)
    try:
        os.replace(folder, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()
