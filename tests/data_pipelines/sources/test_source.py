"""Opening sources, and the interface that all of them have."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources import source as sources
from data_pipelines.sources.selection import table
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import keys, pairs, write_tar
from tests.data_pipelines.sources.formats.test_damage import FORMATS as SHARDS


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_errors_name_the_key_and_the_nearest_valid_one(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", pairs(1)))
    with pytest.raises(DataError, match=r"unknown kind 'tarr'; did you mean 'tar'"):
        open_source({"kind": "tarr", "paths": path})
    with pytest.raises(DataError, match=r"unknown key 'path'; did you mean 'paths'"):
        open_source({"kind": "tar", "path": path})
    with pytest.raises(DataError, match="no paths"):
        open_source({"kind": "tar"})
    with pytest.raises(DataError, match=r"missing-\*\.tar"):
        open_source({"kind": "tar", "paths": str(tmp_path / "missing-*.tar")})
    with pytest.raises(DataError, match=r"filters: unknown key 'min_sise'; did you mean 'min_size'"):
        open_source({"kind": "tar", "paths": path, "filters": {"min_sise": 3}})
    with pytest.raises(DataError, match="min_size must be a number"):
        open_source({"kind": "tar", "paths": path, "filters": {"min_size": "big"}})
    with pytest.raises(DataError, match=r"unknown script 'latn'; did you mean 'latin'"):
        open_source({"kind": "tar", "paths": path, "filters": {"scripts": ["latn"]}})
    with pytest.raises(DataError, match=r"no usable sample in 1 shard.*too_small.: 1"):
        open_source({"kind": "tar", "paths": path, "filters": {"min_size": 1000}})


def test_sizes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(3))
    write_tar(tmp_path / "b.tar", pairs(2))
    source = open_source({"kind": "tar", "paths": str(tmp_path / "{a,b}.tar")})
    assert keys(source) == ["a/00000", "a/00001", "a/00002", "b/00000", "b/00001"]
    counts, sizes = source.image_sizes(np.array([4, 0, 4, 2]))
    assert counts.tolist() == [1, 1, 1, 1]
    assert sizes.tolist() == [[41, 30], [40, 30], [41, 30], [42, 30]]
    assert source.image_sizes(np.zeros(0, np.int64))[1].shape == (0, 2)
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            source.read(wrong)


def test_shards_of_equal_names_keep_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", pairs(1))
    assert keys(open_source({"kind": "tar", "paths": str(tmp_path / "*" / "0.tar")})) == ["x/0/00000", "y/0/00000"]


def test_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    def fingerprint(folder: str, count: int = 3, **more: object) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write_tar(tmp_path / folder / "a.tar", pairs(count))
        os.utime(path, (1, hash(folder) % 1000))
        return open_source({"kind": "tar", "paths": str(path), **more}).fingerprint()

    assert fingerprint("here") == fingerprint("there")
    assert fingerprint("here") != fingerprint("more", 4)
    assert fingerprint("here") != fingerprint("here", filters={"min_similarity": 0.1})


def test_a_shard_cut_or_gone_after_indexing_is_no_bad_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    source = open_source({"kind": "tar", "paths": str(path)})
    os.truncate(path, 1000)
    close_blobs()
    with pytest.raises(StorageError, match=r"a\.tar: changed since it was indexed.*index --force") as error:
        source.read(1)
    assert (error.value.path, error.value.missing) == (str(path), False)
    path.unlink()
    close_blobs()
    with pytest.raises(StorageError, match="no such file") as error:
        source.read(0)
    assert error.value.missing
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.path, copy.detail, copy.missing) == (error.value.path, error.value.detail, True)


def emptied_in_place(path: Path) -> None:
    """Zeros of equal size and age, as a crashed server leaves them."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("fault", [emptied_in_place, cut, Path.unlink])
@pytest.mark.parametrize("opened", [False, True], ids=["new", "opened"])
@pytest.mark.parametrize("name", sorted(SHARDS.keys() - {"a.txt"}))  # any bytes are text: only its stamp tells
def test_no_format_takes_a_shard_that_changed_for_bad_samples(tmp_path: Path, name: str, opened: bool, fault) -> None:
    kind, make = SHARDS[name]
    (tmp_path / name).write_bytes(make(tmp_path))
    source = open_source({"kind": kind, "paths": str(tmp_path / name)})
    expected = [source.read(index) for index in range(len(source))]
    source._format.forget()
    if opened:
        source.read(0)
    fault(tmp_path / name)
    raised = []
    for index in range(1, len(source)):
        try:
            assert source.read(index) == expected[index]  # a row group in memory is still the one that was indexed
        except StorageError as error:
            raised.append(error.path)
    assert raised and set(raised) == {str(tmp_path / name)} and len(raised) >= len(source) // 2


def _captions(source) -> list[str | None]:
    return [source.read(i).caption for i in range(len(source))]


def test_threads_and_processes_read_the_same(tmp_path: Path) -> None:
    source = open_source({"kind": "tar", "paths": str(write_tar(tmp_path / "a.tar", pairs(8)))})
    expected = _captions(source)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [s.caption for s in pool.map(source.read, list(range(8)) * 10)] == expected * 10
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_captions, source).result() == expected


@pytest.mark.parametrize("rows", [1 << 20, 1])
def test_damaged_shards_are_reported_on_opening(tmp_path: Path, monkeypatch, caplog, rows: int) -> None:
    monkeypatch.setattr(table, "TABLE_ROWS", rows)
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(2))
    os.truncate(tmp_path / "b.tar", 2000)
    (tmp_path / "c.tar").write_bytes(b"garbage" * 1000)
    for _ in range(2):  # made, then found
        caplog.clear()
        source = open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
        found = source.problems()
        assert list(found) == [str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warnings == [f"{path}: {problem}" for path, each in found.items() for problem in each]
    monkeypatch.setattr(sources, "_PROBLEMS_LOGGED", 1)
    caplog.clear()
    open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
    assert len(caplog.records) == 2 and "more problems" in caplog.records[1].getMessage()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "sources"
    for name, age in ((f"old.{'1' * 32}.tmp", 100_000), (f"new.{'2' * 32}.tmp", 60), ("kept", 100_000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "row").write_bytes(b"x")
        for path in (folder / name / "row", folder / name):
            os.utime(path, times=(time.time() - age,) * 2)
    open_source({"kind": "tar", "paths": str(write_tar(tmp_path / "a.tar", pairs(1)))})
    assert sorted(path.name for path in folder.iterdir()) == ["kept", f"new.{'2' * 32}.tmp"]
