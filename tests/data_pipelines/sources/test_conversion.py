"""Shards in forms without random access: converted once, and then like those that need none."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.finding import shards_of
from data_pipelines.sources.source import Source, open_source
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes

JPEG = encoded()
RECORDS = [{"id": n, "image": "im/x.jpg", "caption": f"caption {n}\nof é"} for n in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
COCO = {
    "info": {"year": 2026},
    "images": [{"id": 10 + n, "file_name": "im/x.jpg"} for n in range(3)],
    "annotations": [{"id": n, "image_id": 10 + n, "caption": RECORDS[n]["caption"]} for n in range(3)],
}
SPLITS = {"images": [{"filepath": "im/x.jpg", "sentences": [{"raw": r["caption"]}]} for r in RECORDS], "dataset": "x"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set" / "im").mkdir(parents=True)
    (tmp_path / "set" / "im" / "x.jpg").write_bytes(JPEG)
    return tmp_path / "set"


def opened(path: Path, kind: str = "") -> Source:
    (shard,) = shards_of([str(path)], None, {})
    assert not kind or shard.kind == kind
    return open_source({"kind": shard.kind, "paths": str(path)})


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.zst", zstd(LINES.encode())),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}).encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}, indent=2).encode()),
        ("a.json", json.dumps({"annotations": RECORDS, "info": {}}, indent="\t").encode()),
        ("a.jsonl", "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()),
        ("a.jsonl", ",\n".join(json.dumps(record, indent=4) for record in RECORDS).encode()),
        ("a.json", json.dumps(COCO).encode()),
        ("a.json", json.dumps(COCO, indent=2).encode()),
        ("a.json", json.dumps(SPLITS).encode()),
    ],
)
def test_json_of_every_shape(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    source = opened(folder / name, "jsonl")
    samples = [source.read(n) for n in range(len(source))]
    assert [sample.caption for sample in samples] == [record["caption"] for record in RECORDS]
    assert all(sample.images == (JPEG,) for sample in samples)


def test_one_object_is_one_record(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert len(opened(folder / "a.json")) == 1


def test_a_long_wrapped_line(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"version": "1", "data": RECORDS * 2_000}))
    assert len(opened(folder / "a.json")) == 6_000


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_rows_of_csv(folder: Path, suffix: str, delimiter: str) -> None:
    image = base64.b64encode(JPEG).decode()
    rows = [["index", "image", "question", "A", "B", "answer"], ["0", image, "which?", "cat", "dog", "B"]]
    rows += [["1", "0", "and here?", "", "", "a, b"]]
    with (folder / f"bench.{suffix}").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    source = opened(folder / f"bench.{suffix}", "jsonl")
    assert [source.read(n).images for n in range(2)] == [(JPEG,)] * 2
    assert source.read(1).conversations == (("human", "and here?"), ("gpt", "a, b"))
    assert source.read(0).conversations[0][1].startswith("which?\nA. cat\nB. dog\n")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_folders_of_images_with_metadata(folder: Path, name: str) -> None:
    text = 'file_name,text\nim/x.jpg,"a cat, a dog"\n'
    if name.endswith("jsonl"):
        text = json.dumps({"file_name": "im/x.jpg", "text": "a cat, a dog"})
    (folder / name).write_text(text)
    source = opened(folder / name, "jsonl")
    assert (source.read(0).caption, source.read(0).images) == ("a cat, a dog", (JPEG,))
    assert [shard.kind for shard in shards_of([str(folder)], None, {})] == ["jsonl"]


def test_folders_saved_by_hugging_face(folder: Path) -> None:
    table = pa.table({"image": [{"bytes": JPEG, "path": None}] * 3, "text": ["a", "b", "c"]})
    files: dict[str, Callable[[Path], None]] = {
        "data.arrow": lambda path: _stream(table, path),
        "file.arrow": lambda path: pa.feather.write_feather(table, str(path), compression="uncompressed"),
        "data.feather": lambda path: pa.feather.write_feather(table, str(path), compression="zstd"),
    }
    for name, write in files.items():
        write(folder / name)
        source = opened(folder / name, "parquet")
        assert [source.read(n).caption for n in range(3)] == ["a", "b", "c"] and source.read(2).images == (JPEG,)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    assert [shard.kind for shard in shards_of([str(folder)], None, {})].count("parquet") == 3


def _stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar"])
def test_compressed_tars(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    data = tar_bytes(pairs(3))
    (folder / "plain").mkdir()
    (folder / "plain" / "a.tar").write_bytes(data)
    (folder / name).write_bytes(zstd(data) if name.endswith("zst") else gzip.compress(data))
    source, plain = opened(folder / name, "tar"), opened(folder / "plain" / "a.tar")
    assert [source.read(n) for n in range(3)] == [plain.read(n) for n in range(3)]
    assert source.fingerprint() == plain.fingerprint()
    assert caplog.text.count("converted once") == 1
    opened(folder / name)
    assert caplog.text.count("converted once") == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "a.jsonl.gz: not a whole gzip file"),
        ("a.tar", gzip.compress(tar_bytes(pairs(3)), mtime=0)[:-20], "a.tar: not a whole gzip file"),
        ("a.json", b'{\n"data": [\n{"a": 1},\n{"b" 2}]}', r"a.json:4: broken JSON"),
        ("a.json", '{\n"data": [\n{"a": "é"}]}'.encode("latin-1"), r"a.json:3: neither UTF-8 nor UTF-16"),
        ("a.arrow", b"ARROW1 nothing", "a.arrow: not a whole Arrow file"),
    ],
)
def test_what_cannot_be_converted_is_named(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        opened(folder / name)
    assert not list((folder.parent / "cache").rglob("*.tmp"))


def test_identity_does_not_depend_on_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of equal names in several folders, and the same set elsewhere."""
    found = []
    for place in ("one", "two"):
        for name in "ab":
            (folder / place / name).mkdir(parents=True)
            (folder / place / name / "x.csv.gz").write_bytes(gzip.compress(b"text\nwords\n"))
        source = open_source({"kind": "jsonl", "paths": str(folder / place / "*" / "x.csv.gz")})
        assert [source.key(number) for number in range(2)] == ["a/x.csv:1", "b/x.csv:1"]
        found.append(source.fingerprint())
    assert found[0] == found[1]
