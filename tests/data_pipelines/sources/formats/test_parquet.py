"""Parquet files with images in a column."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


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


def test_texts_are_read_alike_without_images(tmp_path: Path) -> None:
    """Tokens are counted without reading images: of every layout the text must be the one that is trained on."""
    picture, talk = {"bytes": encoded(), "path": None}, [{"role": "user", "content": "<image 1> and?"}]
    talk.append({"role": "assistant", "content": "noise"})
    layouts = {
        "interleaved": {"texts": [["before", None, "after", None]], "images": [[None, picture, None, picture]]},
        "image_first": {"texts": [[None, "after"]], "images": [[picture, None]]},
        "messages": {"messages": [talk], "image": [picture]},
        "cauldron": {"texts": [[{"user": "what?", "assistant": "noise"}]], "images": [[picture]]},
        "caption": {"text": ["noise"], "image": [picture]},
        "question": {"question": ["what?"], "answer": ["noise"], "image": [picture]},
    }
    for name, columns in layouts.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns), path)
        source = open_source({"kind": "parquet", "paths": str(path)})
        whole, text = source.read(0), source.read_text(0)
        assert whole.images and (whole.identity, text.images) == (text.identity, ()), name


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("thing", "a/b.jpg", "unread_image_field"),
        ("thing", ["a/b.png"], "unread_image_field"),
        ("thing", {"w": 3, "img_path": "a.webp"}, "unread_image_field"),
        ("thing", "data:image/png;base64," + "A" * 80, "unread_image_field"),
        ("frames", [{"name": "a.jpg"}], "unread_image_field"),
        ("url", "http://a.b/c.jpg", "unread_image_field"),
        ("clip", "a.mp4", "unread_video"),
        ("meta", {"source": {"path": "a.webm"}}, "unread_video"),
        ("image", "a.mp4", "unread_video"),
        ("video", "a", "unread_video"),
        ("wav_path", "a", "unread_audio"),
        ("source", "a web page", None),
        ("source", None, None),
        ("embedding", [0.5] * 9, None),
    ],
)
@pytest.mark.usefixtures("no_pyav")
def test_columns_that_nobody_reads(column: str, value: object, reason: str | None, tmp_path: Path) -> None:
    """As in JSONL, what looks like an image, video or sound under an unknown name is never passed over."""
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]
    rows = [{"conversations": talk, column: value}, {"conversations": talk, column: None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source({"kind": "parquet", "paths": str(tmp_path / "a.parquet")})
    assert (len(source), source.dropped()) == ((1, {reason: 1}) if reason else (2, {}))


def test_columns_of_nulls_do_not_stop_the_search(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]
    columns = {"conversations": [talk], "image": pa.nulls(1), "scan": [encoded()]}
    pq.write_table(pa.table(columns), tmp_path / "null.parquet")
    assert len(open_source({"kind": "parquet", "paths": str(tmp_path / "null.parquet")}).read(0).images) == 1
    pq.write_table(pa.table({**columns, "image": pa.nulls(1, pa.string())}), tmp_path / "string.parquet")
    with pytest.raises(DataError, match=r"unread_image_field: string/row0 \(scan: .*; say what it is with image_key"):
        open_source({"kind": "parquet", "paths": str(tmp_path / "string.parquet")})
    talks = {"conversations": [talk], "image_id": [5]}
    pq.write_table(pa.table(talks), tmp_path / "id.parquet")
    with pytest.raises(DataError, match=r"unread_image_field: id/row0 \(image_id: 5; the image is not in the record"):
        open_source({"kind": "parquet", "paths": str(tmp_path / "id.parquet")})


def test_columns_of_files_hold_images_only_where_they_name_some(tmp_path: Path) -> None:
    """As they do in JSONL: also where there is no other column that may hold images."""
    (tmp_path / "a.jpg").write_bytes(encoded())
    code = {"text": ["code", "more"], "path": ["src/a.py", "a.jpg"]}
    scans = {"text": ["one", "two"], "file_name": ["a.tif", "b.tif"], "scan": [encoded(), None]}
    for name, columns, images in (("code", code, [0, 1]), ("scans", scans, [1])):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        source = open_source({"kind": "parquet", "paths": str(tmp_path / f"{name}.parquet")})
        samples = [source.read(number) for number in range(len(source))]
        assert [len(sample.images) for sample in samples] == images
    assert source.dropped() == {"missing_image": 1}


def test_origins_beside_images_do_not_matter(tmp_path: Path) -> None:
    columns = {"jpg": [encoded()], "caption": ["noise"], "url": ["http://a.b/thumbnail?of=c.mp4"], "mask": [b"\0" * 99]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source({"kind": "parquet", "paths": str(tmp_path / "a.parquet")})
    assert (len(source), source.dropped()) == (1, {})
