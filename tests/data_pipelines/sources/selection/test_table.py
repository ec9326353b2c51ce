"""Large tables of samples in the cache folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources import caption_files
from data_pipelines.sources.selection import table
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, write_jsonl, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_big_tables_are_mapped_from_the_cache(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(3))
    captions = write_jsonl(tmp_path / "c.jsonl", {"00001": "one", "a/00002": "two"})
    spec = {"kind": "tar", "paths": str(path), "captions": str(captions), "filters": {"min_size": 2}}
    small = open_source(spec)
    monkeypatch.setattr(table, "TABLE_ROWS", 1)
    for _ in range(2):  # made, then found
        big = open_source(spec)
        assert isinstance(big.table["row"], np.memmap)
        assert big.fingerprint() == small.fingerprint()
        assert big.dropped() == small.dropped() == {"no_joined_caption": 1}
    copy = pickle.loads(pickle.dumps(big))
    assert [copy.read(i) for i in range(2)] == [small.read(i) for i in range(2)]
    assert len(pickle.dumps(big)) < 3000
    write_tar(path, pairs(2))  # changed: the mapped table is not used
    close_blobs()
    assert len(open_source(spec)) == 1


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_tables_collected_on_disk_equal_those_in_memory(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(caption_files, "_BUFFERED", 2)
    joined = write_jsonl(tmp_path / "c.jsonl", *({"key": f"s{i}/00001", "caption": f"of {i}"} for i in range(4)))
    for i in range(4):
        members = [*pairs(2 + i), *((f"x{j}.jpg", encoded(20, 20, seed=j)) for j in range(i))]
        if kind == "tar":
            write_tar(tmp_path / f"s{i}.tar", members)
        else:
            (tmp_path / f"s{i}").mkdir()
            for name, data in members:
                (tmp_path / f"s{i}" / name).write_bytes(data)
    paths = [str(tmp_path / f"s{i}{'.tar' if kind == 'tar' else ''}") for i in range(4)]
    for more in ({}, {"captions": str(joined)}, {"filters": {"unique_captions": True}}):
        spec = {"kind": kind, "paths": paths, **more}
        with monkeypatch.context() as patch:
            patch.setattr(table, "TABLE_ROWS", 5)
            big = open_source(spec)
            folder = tmp_path / "cache" / "sources"
            assert len(list(folder.iterdir())) == (0 if more == {"captions": str(joined)} else 1)
            for place in folder.iterdir():
                shutil.rmtree(place)
        small = open_source(spec)
        assert (big.fingerprint(), big.dropped()) == (small.fingerprint(), small.dropped())
        assert big.table.keys() == small.table.keys()
        for name, array in small.table.items():
            np.testing.assert_array_equal(big.table[name], array)
        assert [big.read(i) for i in range(len(big))] == [small.read(i) for i in range(len(small))]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("kind", "filters"), [("tar", {}), ("files", {}), ("tar", {"min_size": 22})], ids=str)
def test_each_sample_gets_its_own_caption(tmp_path: Path, monkeypatch, kind: str, filters: dict, on_disk: bool) -> None:
    """Said outright, since both forms of the table share its making; captions lie in another order than the samples."""
    monkeypatch.setattr(caption_files, "_BUFFERED", 3)
    monkeypatch.setattr(table, "TABLE_ROWS", 4 if on_disk else 1 << 20)
    captions, spots = {}, []
    for shard in "pqr":
        members = [(f"{n}.jpg", encoded(20 + n, 20 + n, seed=n)) for n in range(6)]
        if kind == "tar":
            spots.append(str(write_tar(tmp_path / f"{shard}.tar", members)))
        else:
            (tmp_path / shard).mkdir()
            spots.append(str(tmp_path / shard))
            for name, data in members:
                (tmp_path / shard / name).write_bytes(data)
        captions |= {f"{shard}/{n}": f"{'é' * n} caption {n} of {shard}" for n in range(6) if (n + ord(shard)) % 3}
    order = sorted(captions, key=lambda key: key[::-1], reverse=True)
    joined = write_jsonl(tmp_path / "c.jsonl", *({"key": key, "caption": captions[key]} for key in order))
    source = open_source({"kind": kind, "paths": spots, "captions": str(joined), "filters": filters})
    assert isinstance(source.table["row"], np.memmap) == on_disk
    found = [source.read(index) for index in range(len(source))]
    assert len(found) == (8 if filters else 12)
    for sample in found:
        name = sample.key.removesuffix(".jpg").replace(".tar", "")
        assert sample.caption == captions[name]
        assert sample.images == (encoded(20 + int(name[-1]), 20 + int(name[-1]), seed=int(name[-1])),)
    assert [source.read_text(index).caption for index in range(len(source))] == [sample.caption for sample in found]
