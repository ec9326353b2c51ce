"""JSON files and checksums of folders: what weights and checkpoints on disk have in common."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.io.publish import write_json
from mono_jax.errors import ConfigError

CHECKSUMS_FILE = "checksums.json"


class Damaged(Exception):
    """Files that are not what was written; the message names the first bad one."""


_LFS = b"version https://git-lfs.github.com/spec/"


def lfs_error(file: Path) -> str | None:
    """What is wrong, and the fix, if ``file`` is what Git leaves in place of a large file; None if it is none."""
    try:
        with file.open("rb") as handle:
            pointer = handle.read(len(_LFS)) == _LFS
    except OSError:
        return None
    return f"{file}: a Git LFS pointer, not the file itself: run 'git lfs pull' in {file.parent}" if pointer else None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; raises ConfigError that names the file."""
    if problem := lfs_error(file):
        raise ConfigError(problem)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def reason(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    if "No space left on device" in str(error):
        return "no space left on device"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def write_checksums(folder: Path) -> None:
    """Writes ``checksums.json`` into ``folder``: SHA-256 of every file below it."""
    write_json(folder / CHECKSUMS_FILE, {"sha256": _checksums(folder)})


def verify_checksums(folder: Path) -> bool:
    """True if the files are what was written, False if there is no list; raises Damaged that names a bad file."""
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        raise Damaged(f"{folder}: damaged: {CHECKSUMS_FILE} is unreadable") from None
    found = _checksums(folder)
    for name, digest in expected.items():
        if name not in found:
            raise Damaged(f"{folder}: damaged: {name} is missing")
        if found[name] != digest:
            raise Damaged(f"{folder}: damaged: {name} has changed since it was written")
    return True


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS_FILE)

    def digest(file: Path) -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((file.relative_to(folder).as_posix() for file in files), pool.map(digest, files)))
