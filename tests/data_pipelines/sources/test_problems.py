"""Damage that is no single sample's: it is told when a source is opened, and costs no more than it must."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.io import storage
from data_pipelines.sources import captions, indexed
from data_pipelines.sources import source as sources
from data_pipelines.sources.formats import parquet
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("rows", [1 << 20, 1])
def test_damaged_shards_are_told_on_opening(tmp_path: Path, monkeypatch, caplog, rows: int) -> None:
    monkeypatch.setattr(indexed, "TABLE_ROWS", rows)
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(2))
    os.truncate(tmp_path / "b.tar", 2000)
    (tmp_path / "c.tar").write_bytes(b"garbage" * 1000)
    for _ in range(2):  # made, then found
        caplog.clear()
        source = open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
        found = source.problems()
        assert list(found) == [str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert told == [f"{path}: {problem}" for path, each in found.items() for problem in each]
    monkeypatch.setattr(sources, "_PROBLEMS_LOGGED", 1)
    caplog.clear()
    open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
    assert len(caplog.records) == 2 and "problems more" in caplog.records[1].getMessage()


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_remote_data_are_read_without_a_cache_disk(tmp_path: Path, monkeypatch, caplog, fault: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/cacheless/a.bin", bytes(range(100)))
    if fault == "full":
        cache = storage._ChunkCache(tmp_path / "remote", 1 << 20)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage, "write_bytes", full)
    else:
        (tmp_path / "remote").write_bytes(b"")
        cache = storage._ChunkCache(tmp_path / "remote", 1 << 20)
    monkeypatch.setattr(storage, "_chunks", cache)
    for start in (0, 50):
        assert storage.Blob("memory://cacheless/a.bin").read(start, 10) == bytes(range(start, start + 10))
    assert len(caplog.records) == 1 and "remote data is not kept there" in caplog.text
    fs.rm("/cacheless", recursive=True)


def test_broken_lines_of_captions_are_left_out(tmp_path: Path, monkeypatch, caplog) -> None:
    write_tar(tmp_path / "a.tar", pairs(4))
    monkeypatch.setattr(captions, "_MAX_LINE", 200)
    lines = ['{"key": "00000", "caption": "zero"}', "{broken", "[1]", '{"key": "00001", "caption": "one"}', "[" * 190]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join([*lines, '{"00002": "two"}', json.dumps({"00003": "long " * 50})]))
    spec = {"kind": "tar", "paths": str(tmp_path / "a.tar"), "captions": str(file)}
    for _ in range(2):  # made, then found
        caplog.clear()
        source = open_source(spec)
        assert [source.read(i).caption for i in range(len(source))] == ["zero", "one", "two"]
        assert caplog.messages == [f"{file}: 4 broken lines left out, the first is line 2"]
    file.write_text("<html>\n<body>")
    with pytest.raises(DataError, match=r"c\.jsonl:1: .*'key' and 'caption'"):
        open_source(spec)


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "sources"
    for name, age in (("old.1.tmp", 100_000), ("new.2.tmp", 60), ("kept", 100_000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "row").write_bytes(b"x")
        for path in (folder / name / "row", folder / name):
            os.utime(path, times=(time.time() - age,) * 2)
    open_source({"kind": "tar", "paths": str(write_tar(tmp_path / "a.tar", pairs(1)))})
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "new.2.tmp"]


def test_equal_images_of_a_parquet_dictionary_are_not_kept_in_memory(tmp_path: Path, monkeypatch) -> None:
    image = encoded(120, 120)
    table = pa.table({"jpg": pa.array([image] * 600, pa.binary()), "caption": [str(i) for i in range(600)]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size < 2 * len(image)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 100 * len(image))
    source = open_source({"kind": "parquet", "paths": str(tmp_path / "a.parquet")})
    most = 0
    for i in [*range(0, 600, 7), 5, 599]:
        assert (source.read(i).caption, source.read(i).images) == (str(i), (image,))
        most = max(most, sum(batch.nbytes for batch in parquet._local.groups.values()))
    assert most <= 100 * len(image)
