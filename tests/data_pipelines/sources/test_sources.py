"""Sources: the same small interface over every format, filters, joined captions and places."""

from __future__ import annotations

import concurrent.futures
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.sources import captions, indexed
from data_pipelines.sources.formats.array_record import pack, split, unpack
from data_pipelines.sources.indexed import RawSample
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def keys(source) -> list[str]:
    return [source.read_text(i).key for i in range(len(source))]


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]


# --- the interface, over tars


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


def test_stale_and_damaged_indices_are_made_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    spec = {"kind": "tar", "paths": str(path)}
    assert len(open_source(spec)) == 2
    index = tmp_path / "a.tar.index.npz"
    assert index.exists()
    write_tar(path, pairs(4))
    storage.close_blobs()
    assert len(open_source(spec)) == 4
    index.write_bytes(index.read_bytes()[:100])
    assert len(open_source(spec)) == 4
    index.write_bytes(b"no zip")
    assert [open_source(spec).read(i).caption for i in range(4)] == [f"caption {i}" for i in range(4)]


def test_index_goes_to_the_cache_where_shards_cannot_be_written_to(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(1))
    write = storage.write_bytes

    def refuse(place: str, data: bytes) -> None:
        if place.startswith(str(tmp_path / "a.tar")):
            raise PermissionError("read-only")
        write(place, data)

    monkeypatch.setattr(storage, "write_bytes", refuse)
    open_source({"kind": "tar", "paths": str(path)})
    assert not (tmp_path / "a.tar.index.npz").exists()
    assert len(list((tmp_path / "cache" / "index").glob("*-a.tar.index.npz"))) == 1
    open_source({"kind": "tar", "paths": str(path), "index_dir": str(tmp_path / "own")})
    assert len(list((tmp_path / "own").glob("*-a.tar.index.npz"))) == 1


def test_a_shard_cut_after_indexing_gives_bad_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    source = open_source({"kind": "tar", "paths": str(path)})
    os.truncate(path, 1000)
    storage.close_blobs()
    with pytest.raises(BadSample) as error:
        source.read(1)
    assert (error.value.reason, error.value.key) == ("truncated", "a/00001")
    path.unlink()
    storage.close_blobs()
    with pytest.raises(BadSample) as error:
        source.read(0)
    assert error.value.reason == "unreadable"
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.reason, copy.key, copy.detail) == (error.value.reason, error.value.key, error.value.detail)


def _captions(source) -> list[str | None]:
    return [source.read(i).caption for i in range(len(source))]


def test_threads_and_processes_read_the_same(tmp_path: Path) -> None:
    source = open_source({"kind": "tar", "paths": str(write_tar(tmp_path / "a.tar", pairs(8)))})
    expected = _captions(source)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [s.caption for s in pool.map(source.read, list(range(8)) * 10)] == expected * 10
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_captions, source).result() == expected


def test_big_tables_are_mapped_from_the_cache(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(3))
    captions = jsonl(tmp_path / "c.jsonl", {"00001": "one", "a/00002": "two"})
    spec = {"kind": "tar", "paths": str(path), "captions": str(captions), "filters": {"min_size": 2}}
    small = open_source(spec)
    monkeypatch.setattr(indexed, "TABLE_ROWS", 1)
    for _ in range(2):  # made, then found
        big = open_source(spec)
        assert isinstance(big._table.arrays["row"], np.memmap)
        assert big.fingerprint() == small.fingerprint()
        assert big.dropped() == small.dropped() == {"no_joined_caption": 1}
    copy = pickle.loads(pickle.dumps(big))
    assert [copy.read(i) for i in range(2)] == [small.read(i) for i in range(2)]
    assert len(pickle.dumps(big)) < 3000
    write_tar(path, pairs(2))  # changed: the mapped table is not used
    storage.close_blobs()
    assert len(open_source(spec)) == 1


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_tables_collected_on_disk_equal_those_in_memory(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(captions, "_BUFFERED", 2)
    joined = jsonl(tmp_path / "c.jsonl", *({"key": f"s{i}/00001", "caption": f"of {i}"} for i in range(4)))
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
            patch.setattr(indexed, "TABLE_ROWS", 5)
            big = open_source(spec)
            folder = tmp_path / "cache" / "sources"
            assert len(list(folder.iterdir())) == (0 if more == {"captions": str(joined)} else 1)
            for place in folder.iterdir():
                shutil.rmtree(place)
        small = open_source(spec)
        assert (big.fingerprint(), big.dropped()) == (small.fingerprint(), small.dropped())
        assert big._table.arrays.keys() == small._table.arrays.keys()
        for name, array in small._table.arrays.items():
            np.testing.assert_array_equal(big._table.arrays[name], array)
        assert [big.read(i) for i in range(len(big))] == [small.read(i) for i in range(len(small))]


# --- other formats


def test_loose_files(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        (tmp_path / "out" / shard).mkdir(parents=True)
        for name, data in pairs(2):
            (tmp_path / "out" / shard / name).write_bytes(data)
        (tmp_path / "out" / f"{shard}_stats.json").write_text('{"successes": 2}')
        (tmp_path / "out" / f"{shard}.parquet").write_bytes(b"metadata")
    (tmp_path / "out" / "00001" / "00001.txt").write_bytes(b"")
    source = open_source({"kind": "files", "paths": str(tmp_path / "out")})
    assert keys(source) == ["00000/00000", "00000/00001", "00001/00000"]
    assert source.read(1).images == (encoded(41, 30, seed=1),)
    assert source.dropped() == {"no_caption": 1}
    (tmp_path / "out" / "00001" / "00001.txt").write_bytes(b"now there")
    assert len(open_source({"kind": "files", "paths": str(tmp_path / "out")})) == 4


def test_parquet_as_img2dataset_writes_it(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": ["a", "b", "c", "d"],
            "jpg": [encoded(40, 30), None, encoded(50, 30), b"<html>"],
            "caption": ["first", "second", None, "fourth"],
            "status": ["success", "failed_to_download", "success", "success"],
            "similarity": [0.3, 0.2, 0.1, 0.0],
        }
    )
    path = tmp_path / "00000.parquet"
    pq.write_table(table, path, row_group_size=2)
    source = open_source({"kind": "parquet", "paths": str(path)})
    assert source.read(0) == RawSample("00000/a", (encoded(40, 30),), "first")
    assert source.dropped() == {"failed_to_download": 1, "no_caption": 1, "not_an_image": 1}
    with pytest.raises(DataError, match="no column 'pic'; columns: key, jpg"):
        open_source({"kind": "parquet", "paths": str(path), "image_key": "pic"})
    pq.write_table(table.drop(["jpg"]), tmp_path / "meta.parquet")
    with pytest.raises(DataError, match="no column of images"):
        open_source({"kind": "parquet", "paths": str(tmp_path / "meta.parquet")})


def test_parquet_with_structs_lists_and_latin1(tmp_path: Path) -> None:
    image = {"bytes": encoded(), "path": None}
    conversations = [TALK, TALK]
    path = tmp_path / "hf.parquet"
    pq.write_table(pa.table({"images": [[image, image], []], "conversations": conversations}), path)
    source = open_source({"kind": "parquet", "paths": str(path)})
    assert len(source.read(0).images) == 2
    assert source.read(1).images == ()
    assert source.read(1).conversations == (("human", "<image>\nwhat?"), ("gpt", "noise"))
    latin = pa.array([b"caf\xe9", b"good"]).view(pa.string())
    pq.write_table(pa.table({"jpg": [encoded(), encoded()], "caption": latin}), tmp_path / "latin.parquet")
    source = open_source({"kind": "parquet", "paths": str(tmp_path / "latin.parquet")})
    assert source.dropped() == {"caption_not_utf8": 1}
    assert source.read(0).caption == "good"


def test_big_row_groups_are_streamed(tmp_path: Path, monkeypatch) -> None:
    from data_pipelines.sources.formats import parquet

    monkeypatch.setattr(parquet, "_GROUP_BYTES", 0)
    monkeypatch.setattr(parquet, "_BATCH", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg": [encoded()] * 20, "caption": [str(i) for i in range(20)]}), path, row_group_size=11)
    source = open_source({"kind": "parquet", "paths": str(path)})
    for i in [0, 1, 2, 7, 3, 19, 10, 11, 0]:
        assert source.read(i).caption == str(i)
    streams: list[object] = []
    monkeypatch.setattr(parquet, "_batches", lambda *a, real=parquet._batches: streams.append(a) or real(*a))
    for i in range(20):
        assert source.read_text(i).caption == source.read(i).caption == str(i)
    assert len(streams) <= 4  # once through each group for texts, once for both


def test_row_groups_are_kept_while_there_is_room(tmp_path: Path, monkeypatch) -> None:
    from data_pipelines.sources.formats import parquet

    images = [encoded(200, 150, seed=i) for i in range(8)]
    for name in "ab":
        table = pa.table({"jpg": images, "caption": ["words"] * 8})
        pq.write_table(table, tmp_path / name, row_group_size=1, use_dictionary=False, write_statistics=False)
    source = open_source({"kind": "parquet", "paths": [str(tmp_path / name) for name in "ab"]})
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 5 * (len(images[0]) + 100))
    for i in [*range(16), *range(16)]:
        assert source.read(i).images == (images[i % 8],)
    kept = [(path, batch.nbytes) for (path, *_), batch in parquet._local.groups.items()]
    assert [path for path, *_ in kept] == [str(tmp_path / "b")] * len(kept) and 3 <= len(kept) <= 5


def test_a_decompression_bomb_in_parquet_is_not_read(tmp_path: Path, monkeypatch) -> None:
    from data_pipelines.sources.formats import parquet

    monkeypatch.setattr(parquet, "_BOMB_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    table = pa.table({"jpg": [encoded(), encoded() + bytes(2 << 20)], "caption": ["good", "bomb"]})
    pq.write_table(table, path, row_group_size=1, compression="zstd")
    source = open_source({"kind": "parquet", "paths": str(path)})
    assert ([source.read(i).caption for i in range(len(source))], source.dropped()) == (
        ["good"],
        {"corrupt_row_group": 1},
    )


def test_array_record(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    samples = [
        RawSample("a", (encoded(),), "words"),
        RawSample("b", (), conversations=(("human", "é?"), ("gpt", "!"))),
        RawSample("c", text="plain"),
    ]
    path = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for sample in samples:
        writer.write(pack(sample, {"tokens": [1, 2]}))
    writer.write(b"something else")
    writer.close()
    source = open_source({"kind": "array_record", "paths": str(path)})
    assert [source.read(i) for i in range(3)] == [
        RawSample(f"a/{s.key}", s.images, s.caption, s.conversations, s.text) for s in samples
    ]
    assert source.dropped() == {"bad_record": 1}
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/a.array_record", path.read_bytes())
    remote = open_source({"kind": "array_record", "paths": "memory://bucket/a.array_record"})
    assert [remote.read(i) for i in range(3)] == [source.read(i) for i in range(3)]
    fs.rm("/bucket", recursive=True)
    assert unpack(pack(samples[0], {"tokens": [1, 2]}))[0]["tokens"] == [1, 2]
    with pytest.raises(BadSample, match="bad_record"):
        split(pack(samples[0])[:-1])


def test_tfds_without_tensorflow(tmp_path: Path) -> None:
    script = f"""
import io, sys
import fsspec
import numpy as np
import tensorflow_datasets as tfds
from tests.data_pipelines.shard_tools import encoded

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({{
            "image": tfds.features.Image(encoding_format="png"),
            "captions": tfds.features.Sequence({{"text": tfds.features.Text(), "id": np.int64}})}}))
    def _split_generators(self, dl):
        return {{"val": self._generate_examples()}}
    def _generate_examples(self):
        for i in range(3):
            image = io.BytesIO(encoded(20 + i, 10, "PNG"))
            yield i, {{"image": image, "captions": [{{"text": "t%d" % i, "id": i}}] * 2}}

Tiny(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()
from data_pipelines.sources.source import open_source
source = open_source({{"kind": "tfds", "paths": {str(tmp_path / "tiny" / "1.0.0")!r}, "split": "val"}})
samples = [source.read(i) for i in range(3)]
assert sorted(s.caption for s in samples) == ["t0", "t1", "t2"], samples
for i, s in enumerate(samples):
    assert s.images == (encoded(20 + int(s.caption[1]), 10, "PNG"),)
    assert source.image_sizes([i])[1].tolist() == [[20 + int(s.caption[1]), 10]]
fs = fsspec.filesystem("memory")
fs.put({str(tmp_path / "tiny" / "1.0.0")!r}, "/bucket/1.0.0", recursive=True)
remote = open_source({{"kind": "tfds", "paths": "memory://bucket/1.0.0", "split": "val"}})
assert [remote.read(i) for i in range(3)] == samples
assert "tensorflow" not in sys.modules
"""
    import subprocess
    import sys

    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parents[2])])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_llava_jsonl(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.jpg").write_bytes(encoded(12, 34, orientation=6))
    path = jsonl(
        tmp_path / "chat.jsonl",
        {"id": 7, "image": "x.jpg", "conversations": TALK},
        {"id": 8, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "image": ["x.jpg", "x.jpg"],
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        },
        {"image": "gone.jpg", "conversations": TALK},
        {"image": 5, "conversations": TALK},
        {"conversations": []},
        {"text": "plain"},
    )
    path.write_text(path.read_text() + "\n{broken\n[1]\n")
    source = open_source({"kind": "jsonl", "paths": str(path), "image_root": str(tmp_path / "pictures")})
    assert keys(source) == [f"chat.jsonl:{n}" for n in (1, 2, 3, 7)]
    assert source.dropped() == {"missing_image": 1, "bad_image_field": 1, "bad_conversation": 1, "broken_json": 2}
    assert source.read(0).images == (encoded(12, 34, orientation=6),)
    assert source.read(2).conversations == (("human", "?"), ("gpt", "!"))
    assert source.read(3).text == "plain"
    counts, sizes = source.image_sizes(np.arange(4))
    assert counts.tolist() == [1, 0, 2, 0]
    assert sizes.tolist() == [[34, 12]] * 3  # upright


def test_json_lists_and_internvl_meta(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "x.jpg").write_bytes(encoded())
    records = [{"image": "x.jpg", "conversations": TALK, "note": f'a "quoted\\" {{[{i}'} for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    jsonl(tmp_path / "lines.jsonl", *records)
    meta = {
        "lists": {"root": "img", "annotation": "list.json", "repeat_time": 2.5, "length": 4},
        "lines": {"root": "img", "annotation": "lines.jsonl", "repeat_time": 0.5, "length": 4},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    source = open_source({"kind": "jsonl", "paths": str(tmp_path / "meta.json")})
    expected = [f"list.json:{n}{mark}" for mark in ("", "#2") for n in (1, 2, 3, 4)]
    assert keys(source) == [*expected, "list.json:1#3", "list.json:3#3", "lines.jsonl:1", "lines.jsonl:3"]
    assert all(source.read(i).images == (encoded(),) for i in range(len(source)))
    (tmp_path / "meta.json").write_text(json.dumps({"x": {"annotation": "gone.jsonl"}}))
    with pytest.raises(DataError, match=r"annotation of 'x' not found: gone\.jsonl"):
        open_source({"kind": "jsonl", "paths": str(tmp_path / "meta.json")})
    (tmp_path / "cut.json").write_text(json.dumps(records)[:-30])
    cut = open_source({"kind": "jsonl", "paths": str(tmp_path / "cut.json"), "image_root": str(tmp_path / "img")})
    assert (len(cut), cut.dropped()) == (3, {"broken_json": 1})


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_text_is_cut_without_loss(tmp_path: Path, separator: str) -> None:
    text = separator.join(f"word{i}é語😀" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    source = open_source({"kind": "text", "paths": str(tmp_path / "a.txt"), "chunk_bytes": 100})
    pieces = [source.read(i).text for i in range(len(source))]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 100
    assert source.read(0).key == "a.txt:1"
    if separator:
        assert all(piece.endswith(separator) for piece in pieces[:-1])


# --- captions and filters


def test_captions_are_joined_by_key(tmp_path: Path) -> None:
    members = pairs(4)
    members[2] = ("00000.txt", b"")  # without a caption of its own
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", pairs(1))
    pq.write_table(
        pa.table({"key": ["00000", "00001", "00002", "b/00000"], "caption": ["ény", "one", None, "of b"]}),
        tmp_path / "c.parquet",
    )
    spec = {"kind": "tar", "paths": str(tmp_path / "*.tar")}
    source = open_source({**spec, "captions": str(tmp_path / "c.parquet")})
    assert [(s.key, s.caption) for s in map(source.read, range(len(source)))] == [
        ("a/00000", "ény"),
        ("a/00001", "one"),
        ("b/00000", "of b"),
    ]
    assert source.dropped() == {"no_joined_caption": 2}
    same = jsonl(
        tmp_path / "c.jsonl", {"key": "00000", "caption": "old"}, {"00000": "ény", "00001": "one", "b/00000": "of b"}
    )
    assert open_source({**spec, "captions": str(same)}).fingerprint() == source.fingerprint()
    longer = open_source({**spec, "captions": str(same), "filters": {"min_caption_chars": 4}})
    assert [longer.read_text(i).caption for i in range(len(longer))] == ["of b"]  # filters see the joined captions
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"c\.jsonl:1: not JSON"):
        open_source({**spec, "captions": str(tmp_path / "c.jsonl")})


def write_noisy(path: Path) -> Path:
    """Eight pairs, each with one fault but the first."""
    rows = [
        ("good", encoded(64, 64, seed=0), "a good caption", {}),
        ("small", encoded(64, 20, seed=1), "a small caption", {}),
        ("long", encoded(400, 64, seed=2), "a long caption", {}),
        ("unlike", encoded(64, 64, seed=3), "an unlike caption", {"similarity": 0.1}),
        ("unsafe", encoded(64, 64, seed=4), "an unsafe caption", {"punsafe": 0.9}),
        ("marked", encoded(64, 64, seed=5), "a marked caption", {"pwatermark": None}),
        ("short", encoded(64, 64, seed=6), "ab", {}),
        ("russian", encoded(64, 64, seed=7), "подпись к картинке", {}),
        ("again", encoded(64, 64, seed=8), "a good caption", {}),
        ("copy", encoded(64, 64, seed=0), "another caption", {}),
    ]
    members = []
    for key, image, caption, faults in rows:
        fields = {"similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.1, **faults}
        members += [
            (f"{key}.jpg", image),
            (f"{key}.json", json.dumps(fields).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return write_tar(path, members)


def test_every_filter_counts_what_it_drops(tmp_path: Path) -> None:
    path = write_noisy(tmp_path / "n.tar")
    filters = {
        "min_size": 64,
        "max_aspect_ratio": 3,
        "min_similarity": 0.3,
        "max_punsafe": 0.5,
        "max_pwatermark": 0.1,
        "min_caption_chars": 3,
        "max_caption_chars": 100,
        "scripts": ["latin", "han"],
        "unique_captions": True,
        "unique_images": True,
    }
    source = open_source({"kind": "tar", "paths": str(path), "filters": filters})
    assert keys(source) == ["n/good"]
    reasons = ["too_small", "aspect_ratio", "similarity", "punsafe", "pwatermark", "caption_too_short", "script"]
    assert source.dropped() == dict.fromkeys([*reasons, "duplicate_caption", "duplicate_image"], 1)
    assert len(open_source({"kind": "tar", "paths": str(path), "filters": {}})) == 10


def test_sha256_of_img2dataset_serves_as_image_hash(tmp_path: Path) -> None:
    members = []
    for i, mark in enumerate(["x", "y", "x"]):
        members += [(f"{i}.jpg", encoded(seed=i)), (f"{i}.json", json.dumps({"caption": "c", "sha256": mark}).encode())]
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source({"kind": "tar", "paths": str(path), "filters": {"unique_images": True}})
    assert keys(source) == ["a/0", "a/1"]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Plain words, 100%", "latin"),
        ("42 + 1", "none"),
        ("Ένα", "greek"),
        ("слово word слово", "cyrillic"),
        ("汉字和一点点 ascii", "han"),
        ("日本の写真", "kana"),
        ("한국어", "hangul"),
        ("مرحبا", "arabic"),
        ("नमस्ते", "devanagari"),
        ("สวัสดี", "thai"),
        ("naïve café", "latin"),
        ("😀😀", "none"),
        ("", "none"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    from data_pipelines.records.scripts import SCRIPTS, script_of

    assert SCRIPTS[script_of(text)] == script


# --- places


def test_memory_file_system(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/shards/00000.tar", tar_bytes(pairs(3)))
    fs.pipe_file("/bucket/shards/00001.tar", tar_bytes(pairs(2)))
    fs.pipe_file("/bucket/captions.jsonl", b'{"00000": "joined"}')
    fs.pipe_file("/bucket/photos/x.jpg", encoded())
    fs.pipe_file("/bucket/chat.jsonl", json.dumps({"image": "photos/x.jpg", "conversations": TALK}).encode())
    fs.pipe_file("/bucket/loose/k.jpg", encoded())
    fs.pipe_file("/bucket/loose/k.txt", b"loose words")
    try:
        source = open_source({"kind": "tar", "paths": "memory://bucket/shards/*.tar"})
        assert keys(source) == ["00000/00000", "00000/00001", "00000/00002", "00001/00000", "00001/00001"]
        assert source.read(4).images == (encoded(41, 30, seed=1),)
        assert fs.exists("/bucket/shards/00000.tar.index.npz")
        local = tmp_path / "00000.tar"
        write_tar(local, pairs(3))
        write_tar(tmp_path / "00001.tar", pairs(2))
        assert open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")}).fingerprint() == source.fingerprint()
        joined = {"kind": "tar", "paths": "memory://bucket/shards/*.tar", "captions": "memory://bucket/captions.jsonl"}
        assert len(open_source(joined)) == 2
        assert open_source({"kind": "jsonl", "paths": "memory://bucket/chat.jsonl"}).read(0).images == (encoded(),)
        loose = open_source({"kind": "files", "paths": "memory://bucket/loose"})
        assert (loose.read(0).caption, loose.read(0).images) == ("loose words", (encoded(),))
        with pytest.raises(DataError, match="bucket"):
            open_source({"kind": "tar", "paths": "memory://bucket/none-*.tar"})
    finally:
        fs.rm("/bucket", recursive=True)
        storage.close_blobs()


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows byte ranges, as object stores do."""

    def do_GET(self) -> None:
        if not self._file().is_file():
            self.send_error(404)
            return
        data = self._file().read_bytes()
        start, end = 0, len(data) - 1
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[start : end + 1])

    def do_HEAD(self) -> None:
        if not self._file().is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self._file().stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def _file(self) -> Path:
        return Path(self.directory) / self.path.lstrip("/")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = functools.partial(_Ranges, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_http_is_read_by_ranges_and_indexed_in_the_cache(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")
    write_tar(tmp_path / "www" / "a.tar", pairs(3))
    source = open_source({"kind": "tar", "paths": f"{server}/a.tar"})
    assert source.read(2).images == (encoded(42, 30, seed=2),)
    assert len(list((tmp_path / "cache" / "index").glob("*a.tar.index.npz"))) == 1
