"""Files that are kept between runs, damaged in every way: made again, or reported in one line; never other batches."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.io import publish
from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources.selection import table
from data_pipelines.sources.source import open_source
from tests.data_pipelines import shard_tools
from tests.made_sets import config, packed, tars, write_pairs


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(data))


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(5)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "flipped": flipped,
    "noise": noise,
    "longer": longer,
    "zeros": lambda data, rng: bytes(len(data)),
    "empty": lambda data, rng: b"",
    "text": lambda data, rng: b"not found\n",
    "other json": lambda data, rng: b'{"reasons": 3}',
}
KEPT = {
    "lengths": "cache/lengths/*.npy",
    "what goes with lengths": "cache/lengths/*.json",
    "plan": "cache/plans/*.npy",
    "index": "data/00000.tar.index.npz",
    "table": "home/sources/*/text_offset",
    "header of the table": "home/sources/*/columns.json",
    "captions": "home/captions/*/texts",
    "order of the captions": "home/captions/*/start",
    "header of the captions": "home/captions/*/columns.json",
}
ROUNDS = {"flipped": 12, "truncated": 4}  # of a kind of damage; others once


class Kept:
    """A source with captions whose caches are all there, and its batches."""

    def __init__(self, folder: Path, golden: Path):
        self.folder = folder
        write_pairs(folder / "data", 60)
        keys = [key.partition("/")[2] for key in shard_tools.keys(open_source(tars(folder / "data")["spec"]))]
        shutil.rmtree(folder / "home")  # the table of the source without captions
        lines = [f'{{"key": "{key}", "caption": "a picture with number {key}"}}' for key in keys]
        (folder / "data" / "captions.jsonl").write_text("\n".join(lines[:50]) + "\n")
        source = tars(folder / "data")
        source["spec"]["captions"] = str(folder / "data" / "captions.jsonl")
        self.settings = config(golden, source)
        self.expected = self.batches()

    def batches(self) -> tuple[str, list[str]]:
        close_blobs()
        data = packed(self.settings, self.folder / "cache")
        return data.identity, [batch_hash(data.batch(step)) for step in range(data.total_steps())]

    def file(self, pattern: str) -> Path:
        (found,) = self.folder.glob(pattern)
        return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path):
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONO_JAX_CACHE", str(folder / "home"))
        patch.setattr(table, "TABLE_ROWS", 1)
        yield Kept(folder, golden_dir)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", KEPT.values(), ids=KEPT)
def test_damaged_files_are_made_again(kept: Kept, pattern: str, damage: str) -> None:
    assert len(kept.expected[1]) >= 2
    for seed in range(ROUNDS.get(damage, 1)):
        file = kept.file(pattern)
        whole = file.read_bytes()
        file.write_bytes(DAMAGES[damage](whole, random.Random(seed)))
        assert kept.batches() == kept.expected, seed
        harmless = damage == "longer" or pattern.endswith("npz")  # what is mapped is shorter; zip files hold times
        assert kept.file(pattern).read_bytes() == whole or harmless, seed
        kept.file(pattern).write_bytes(whole)


@pytest.mark.parametrize("pattern", KEPT.values(), ids=KEPT)
def test_a_folder_in_the_place_of_a_file(kept: Kept, pattern: str) -> None:
    file = kept.file(pattern)
    whole = file.read_bytes()
    file.unlink()
    file.mkdir()
    try:
        assert kept.batches() == kept.expected
    except DataError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    finally:
        if file.is_dir():
            shutil.rmtree(file)
            file.write_bytes(whole)
    assert kept.batches() == kept.expected


@pytest.mark.parametrize("pattern", KEPT.values(), ids=KEPT)
def test_a_file_that_may_not_be_read(kept: Kept, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported with its name, or made again elsewhere; never taken for absent in silence, never a traceback."""
    file = kept.file(pattern)

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(path: object, *arguments: object, **named: object) -> Any:
            if str(path) == str(file):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(path, *arguments, **named)

        return function

    for module in (io, builtins, os):
        monkeypatch.setattr(module, "open", refusing(module.open))
    try:
        found = kept.batches()
    except DataError as error:
        assert "Permission denied" in str(error) and "\n" not in str(error)
    else:
        assert found == kept.expected
    monkeypatch.undo()
    assert kept.batches() == kept.expected


def test_a_full_disk_is_one_line(golden_dir: Path, pairs: Path, tmp_path: Path, monkeypatch) -> None:
    """No map of a sparse file, which would end the process by SIGBUS."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "write_bytes", full)
    with pytest.raises(DataError, match=r"lengths/.*\.npy: No space left on device; free some space"):
        packed(config(golden_dir, tars(pairs)), tmp_path)
