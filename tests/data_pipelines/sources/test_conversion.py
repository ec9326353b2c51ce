"""Shards in formats without random access: converted once, and then like those that need none."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import json
import lzma
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
KEYED = {"im/x.jpg": RECORDS[0]["caption"], "im/./x.jpg": RECORDS[1]["caption"], "im//x.jpg": [RECORDS[2]["caption"]]}
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
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.jsonl.lz4", pa.compress(LINES.encode(), codec="lz4", asbytes=True)),
        *(("a.json", LINES.encode(codec)) for codec in ("utf-16-le", "utf-16-be", "utf-32", "utf-32-be")),
        ("a.jsonl", "".join(map(json.dumps, RECORDS)).encode()),
        ("a.jsonl", "\r".join(map(json.dumps, RECORDS)).encode()),
        ("a.jsonl", ",\n".join(map(json.dumps, RECORDS)).encode()),
        ("a.json", json.dumps({"data": {"train": RECORDS[:2], "val": RECORDS[2:]}}).encode()),
        ("a.json", json.dumps({str(record["id"]): record for record in RECORDS}).encode()),
        ("a.json", json.dumps(KEYED, indent=1).encode()),
        ("a.json", json.dumps({name: [record[name] for record in RECORDS] for name in RECORDS[0]}).encode()),
        ("a.json", json.dumps({name: {str(r["id"]): r[name] for r in RECORDS} for name in RECORDS[0]}).encode()),
        ("a.json", json.dumps({"columns": list(RECORDS[0]), "data": [list(r.values()) for r in RECORDS]}).encode()),
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


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ", "])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n", "sep={}\n"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_tables_of_every_spelling(folder: Path, delimiter: str, name: str, start: str, codec: str) -> None:
    rows = [["image", "caption"], ["im/x.jpg", '"a, b; c | d"'], ["im/x.jpg", "é"]]
    text = start.format(delimiter.strip(" ")) + "".join(delimiter.join(row) + "\r\n" for row in rows)
    (folder / name).write_bytes(text.removeprefix("\ufeff" if codec == "utf-16" else "").encode(codec))
    source = opened(folder / name, "jsonl")
    assert [source.read(n).caption for n in range(len(source))] == ["a, b; c | d", "é"]


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


TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]


@pytest.mark.parametrize(
    ("name", "text", "kinds"),
    [
        ("llava.json", json.dumps([{"image": "im/x.jpg", "conversations": TALK}]), ["jsonl", "files"]),
        ("captions.json", json.dumps({"im/x.jpg": "one"}), ["jsonl", "files"]),
        ("captions.csv", "image;caption\nim/x.jpg;one\n", ["jsonl", "files"]),
        ("widths.csv", "width,height\n3,4\n", ["files"]),
        ("config.json", json.dumps({"version": 1, "tiles": {"size": 4}}), ["files"]),
        ("meta.json", json.dumps({"a": {"annotation": "talks.jsonl", "root": "im"}}), ["jsonl", "files"]),
        ("meta.json", json.dumps({"a": {"annotation": "nowhere.jsonl", "root": "im"}}), ["jsonl", "jsonl", "files"]),
        ("mix.yaml", "datasets:\n- json_path: talks.jsonl\n", ["jsonl", "files"]),
        ("other.yaml", "a: 1\n", ["jsonl", "files"]),
        ("talk.json", json.dumps(TALK), ["files"]),
        ("im/x.json", json.dumps([{"image": "x.jpg", "caption": "one"}]), ["files"]),
        ("clips/1.mp4", "", ["files", "files"]),
    ],
)
def test_what_a_folder_holds(folder: Path, name: str, text: str, kinds: list[str]) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    if name in ("meta.json", "mix.yaml", "other.yaml"):
        (folder / "talks.jsonl").write_text(json.dumps({"image": "x.jpg", "conversations": TALK}))
    assert sorted(shard.kind for shard in shards_of([str(folder)], None, {"kind": None})) == sorted(kinds)


def test_records_beside_loose_images_are_no_sample(folder: Path) -> None:
    (folder / "im" / "x.txt").write_text("words")
    (folder / "im" / "records.json").write_text(json.dumps(RECORDS))
    source = open_source({"kind": "files", "paths": str(folder)})
    assert (len(source), source.dropped()) == (1, {})
    (problem,) = next(iter(source.problems().values()))
    assert problem == "ignored: 1 files of records, such as records.json: read them as kind 'jsonl'"


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
    assert [shard.kind for shard in shards_of([str(folder)], None, {})].count("parquet") == 3
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
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "a.jsonl.gz: not a valid gzip file"),
        ("a.tar", gzip.compress(tar_bytes(pairs(3)), mtime=0)[:-20], "a.tar: not a valid gzip file"),
        ("a.json", b'{\n"data": [\n{"a": 1},\n{"b" 2}]}', r"a.json:4: broken JSON"),
        ("a.json", '{\n"data": [\n{"a": "é"}]}'.encode("latin-1"), r"a.json:3: not UTF-8 .*; write the file as UTF-8"),
        ("a.csv", "image,caption\na.jpg,é\n".encode("latin-1"), r"a.csv:2: not UTF-8 \(.*\); write the file as UTF-8"),
        (
            "a.csv",
            b"a.jpg,one\nb.jpg,two\n",
            "a.csv:1: names an image, not the columns: put a line such as 'image,caption'",
        ),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-20], "a.jsonl.xz: not a valid xz file"),
        ("a.tar", b"PK\3\4....", "a.tar: a zip archive: unpack it"),
        ("a.jsonl", b"<!DOCTYPE html>", "a.jsonl: a page of the web: the download failed"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "a.parquet: a pointer of Git LFS"),
        ("a.txt", b"image,caption\na.jpg,one\n", "a.txt: a table of images, not text .*name it .csv or .tsv"),
        ("a.txt", b"1.jpg#0\tone\n1.jpg#1\ttwo\n", "a.txt: a table of images"),
        ("a.jsonl", b"", "empty: there is no sample in it"),
        ("a.csv", b"image,caption\n", "empty: there is no sample in it"),
        ("a.arrow", b"ARROW1 nothing", "a.arrow: not a valid Arrow file"),
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
