"""JSON files and checksums of folders, shared by weights and checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.io.publish import write_json
from mono_jax.errors import ConfigError
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place

CHECKSUMS_FILE = "checksums.json"


class Damaged(Exception):
    """Files that differ from what was written; the message names the first bad one."""


_LFS = b"version https://git-lfs.github.com/spec/"


def lfs_error(file: Path) -> str | None:
    """The problem and the fix if ``file`` is a Git LFS pointer instead of the large file itself; None if it is not."""
    try:
        with file.open("rb") as handle:
            pointer = handle.read(len(_LFS)) == _LFS
    except OSError:
        return None
    return f"{file}: a Git LFS pointer, not the file itself: run 'git lfs pull' in {file.parent}" if pointer else None


def read_json(file: Place) -> dict[str, Any]:
    """The JSON object in ``file``; raises ConfigError that names the file."""
    if isinstance(file, Path) and (problem := lfs_error(file)):
        raise ConfigError(problem)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def stored_json(file: Place) -> dict[str, Any]:
    """The JSON object in ``file``; {} if the file is missing or damaged."""
    try:
        return read_json(file)
    except ConfigError:
        return {}


def reason(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    if "No space left on device" in str(error):
        return "no space left on device"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "..."


def write_checksums(folder: Path, process: int = 0, processes: int = 1) -> None:
    """Writes the SHA-256 of every file below ``folder`` into ``checksums.json``.

    If several ``processes`` wrote the folder together, each lists the files that it wrote (process 1 in
    ``checksums.1.json`` and so on) right after writing, while they are likely to be in its page cache.
    """
    names = [name for name in _files(folder) if _writer(name) % processes == process]
    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(names, pool.map(lambda name: _digest(folder / name), names)))
    write_json(folder / list_name(process), {"processes": processes, "sha256": sums})


def verify_checksums(folder: Place, process: int = 0, processes: int = 1) -> bool:
    """True if the files are unchanged since they were written, False if a list is missing; raises Damaged that names a
    bad file.

    If several ``processes`` share the work, ``process`` checks every ``processes``-th file.
    """
    if not (folder / CHECKSUMS_FILE).is_file():
        return False
    lists = lists_of(folder)
    if not all((folder / name).is_file() for name in lists):
        return False
    listed = [entry for name in lists for entry in _read_list(folder, name)["sha256"].items()]
    expected = dict(listed[process::processes])
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(expected, pool.map(lambda name: _digest(folder / name), expected)))
    for file, digest in expected.items():
        if found[file] is None:
            raise Damaged(f"{folder}: damaged: {file} is missing")
        if found[file] != digest:
            raise Damaged(f"{folder}: damaged: {file} has changed since it was written")
    return True


def lists_of(folder: Place) -> list[str]:
    """Names of the checksum lists that a complete folder has; raises Damaged if the first one is unreadable."""
    return [list_name(number) for number in range(_read_list(folder, CHECKSUMS_FILE).get("processes", 1))]


def _read_list(folder: Place, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
        if isinstance(content["sha256"], dict) and isinstance(content.get("processes", 1), int):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Damaged(f"{folder}: damaged: {name} is unreadable")


def list_name(process: int) -> str:
    """Name of the list of the files that ``process`` wrote."""
    return CHECKSUMS_FILE if process == 0 else f"checksums.{process}.json"


_LIST = re.compile(r"checksums(\.\d+)?\.json")
_PROCESS_FOLDER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")


def _writer(name: str) -> int:
    """The process that wrote a file of a checkpoint: Orbax gives each process its own folder, process 0 writes the
    rest."""
    found = _PROCESS_FOLDER.search(name)
    return int(found[1]) if found else 0


def _files(folder: Path) -> list[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if not _LIST.fullmatch(name))


def _digest(file: Place) -> str | None:
    """SHA-256 of a file; None if it does not exist."""
    try:
        if isinstance(file, ObjectPath):
            return hashlib.sha256(file.read_bytes()).hexdigest()
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        return None
