"""Where indices are kept, and when they are made again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs, copies
from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.formats.jsonl import JsonlFormat
from data_pipelines.sources.formats.tar import TarFormat
from data_pipelines.sources.indexing import load_or_make, make_index, shard_stamp
from data_pipelines.sources.indices.shard_index import UNASKED
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, pairs, write_jsonl, write_tar
from tests.data_pipelines.sources.formats.test_damage import FORMATS as SHARDS


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_stale_and_damaged_indices_are_made_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    spec = {"kind": "tar", "paths": str(path)}
    assert len(open_source(spec)) == 2
    index = tmp_path / "a.tar.index.npz"
    assert index.exists()
    write_tar(path, pairs(4))
    close_blobs()
    assert len(open_source(spec)) == 4
    index.write_bytes(index.read_bytes()[:100])
    assert len(open_source(spec)) == 4
    index.write_bytes(b"no zip")
    assert [open_source(spec).read(i).caption for i in range(4)] == [f"caption {i}" for i in range(4)]


def test_index_goes_to_the_cache_where_shards_cannot_be_written_to(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(1))
    write = copies.write_bytes

    def refuse(place: str, data: bytes) -> None:
        if place.startswith(str(tmp_path / "a.tar")):
            raise PermissionError("read-only")
        write(place, data)

    monkeypatch.setattr(copies, "write_bytes", refuse)
    open_source({"kind": "tar", "paths": str(path)})
    assert not (tmp_path / "a.tar.index.npz").exists()
    assert len(list((tmp_path / "cache" / "index").glob("*-a.tar.index.npz"))) == 1
    open_source({"kind": "tar", "paths": str(path), "index_dir": str(tmp_path / "own")})
    assert len(list((tmp_path / "own").glob("*-a.tar.index.npz"))) == 1


def test_a_touched_shard_is_not_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(3))
    (tmp_path / "x.jpg").write_bytes(encoded())
    lines = write_jsonl(tmp_path / "b.jsonl", {"image": "x.jpg", "conversations": TALK})
    shards = [make_shard("tar", str(path)), make_shard("jsonl", str(lines))]
    before = [load_or_make(shard)[0] for shard in shards]
    for file in (path, lines, tmp_path / "x.jpg"):
        os.utime(file, (1, 1))

    def never(*_: object) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        for form in (TarFormat, JsonlFormat):
            patch.setattr(form, "scan", never)
        for shard, index in zip(shards, before):
            again, made = load_or_make(shard)
            assert not made and again.meta["digest"] == index.meta["digest"]
        # The new time is kept: next time, nothing is read at all.
        patch.setattr(blobs, "content_mark", never)
        assert [load_or_make(shard)[1] for shard in shards] == [False, False]
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 1")] ^= 1
    path.write_bytes(data)
    os.utime(path, (2, 2))
    assert load_or_make(shards[0])[1]


def refusing(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Files of these names answer 503; returns the images that are asked for."""
    real, asked = blobs.read_bytes, []

    def read_bytes(path: str, limit: int | None = None) -> bytes:
        asked.extend([Path(path).name] if path.endswith(".jpg") else [])
        if path.endswith(names):
            raise StorageError(path, "503 Service Unavailable")
        return real(path, limit)

    monkeypatch.setattr(blobs, "read_bytes", read_bytes)
    return asked


@pytest.mark.parametrize("kind", ["jsonl", "files"])
def test_images_that_did_not_answer_are_asked_again(tmp_path: Path, monkeypatch, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(encoded(40 + i, 30, seed=i))
        if kind == "files":
            (folder / f"{i}.txt").write_text("words")
    (folder / "9.jpg").unlink()
    path = folder
    if kind == "jsonl":
        talk = [{"image": f"{i}.jpg", "conversations": TALK} for i in range(10)]
        path = write_jsonl(tmp_path / "a.jsonl", *talk, {"text": "plain"})
    options = {"image_root": str(folder)} if kind == "jsonl" else {}
    spec = {"kind": kind, "paths": str(path), **options}
    shard = make_shard(kind, str(path), **options)
    missing = {"missing_image" if kind == "jsonl" else "no_image": 1}
    whole = make_index(shard, shard_stamp(shard))
    with monkeypatch.context() as patch:
        refusing(patch, "3.jpg", "7.jpg")
        assert open_source(spec).dropped() == {UNASKED: 2, **missing}
    with monkeypatch.context() as patch:  # one of them answers now; workers do not ask
        asked = refusing(patch, "7.jpg")
        assert open_source(spec, ask_again=False).dropped() == {UNASKED: 2, **missing} and not asked
        assert open_source(spec).dropped() == {UNASKED: 1, **missing}
        assert kind == "files" or set(asked) == {"3.jpg", "7.jpg"}  # the others are known
    assert open_source(spec).dropped() == missing
    index, made = load_or_make(shard)
    assert not made and index.meta["digest"] == whole.meta["digest"]
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(index.columns[name], column)


def test_storage_that_is_away_is_no_list_of_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", *({"image": f"{i}.jpg", "conversations": TALK} for i in range(10)))
    refusing(monkeypatch, ".jpg")
    with pytest.raises(StorageError, match=r"2\.jpg: 503"):
        load_or_make(make_shard("jsonl", str(tmp_path / "a.jsonl")))
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl", "a.txt"])
def test_a_shard_that_cannot_be_read_is_not_corrupt(tmp_path: Path, monkeypatch, name: str) -> None:
    kind, make = SHARDS[name]
    (tmp_path / name).write_bytes(make(tmp_path))
    shard = make_shard(kind, str(tmp_path / name))

    def broken(self: blobs.PatientFile, offset: int, length: int) -> bytes:
        raise StorageError(self._path, "Input/output error")

    monkeypatch.setattr(blobs.PatientFile, "_read", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        load_or_make(shard)
