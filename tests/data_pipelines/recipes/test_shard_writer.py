"""Shards have the layout that img2dataset writes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.recipes.shard_writer import ShardWriter, encode_image, read_captions


def _image(color: str) -> Image.Image:
    return Image.new("RGB", (12, 8), color)


def test_layout_of_a_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, samples_per_shard=1000) as writer:
        keys = [
            writer.write(encode_image(_image(c)), caption, size=(12, 8), url=f"http://x/{c}")
            for c, caption in (("red", "a <b>red</b>\nthing"), ("blue", None))
        ]
    assert keys == ["00000000", "00000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json"]
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (2, 2, {"success": 2})
    table = pq.read_table(tmp_path / "00000.parquet")
    assert table.column_names == [
        "caption", "url", "key", "status", "error_message", "width", "height", "original_width", "original_height",
        "exif", "sha256",
    ]  # fmt: skip
    assert table.column("caption").to_pylist() == ["a <b>red</b>\nthing", None]
    assert list(read_captions(tmp_path)) == table.column("caption").to_pylist()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames() == [f"{key}.{e}" for key in keys for e in ("jpg", "json", "txt")]
        assert all("mtime" in member.pax_headers for member in tar.getmembers())
        contents = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert Image.open(io.BytesIO(contents["00000000.jpg"])).size == (12, 8)
    assert contents["00000000.txt"] == b"a <b>red</b>\nthing"
    assert contents["00000001.txt"] == b""  # a caption of None: empty text, null in the JSON
    assert json.loads(contents["00000001.json"]) | {"sha256": ""} == {
        "caption": None, "url": "http://x/blue", "key": "00000001", "status": "success", "error_message": None,
        "width": 12, "height": 8, "original_width": 12, "original_height": 8, "exif": "{}", "sha256": "",
    }  # fmt: skip


def test_shards_roll_over_with_unique_keys_and_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder, samples_per_shard=2) as writer:
            keys = [writer.write(encode_image(_image("red")), str(i), size=(12, 8)) for i in range(5)]
    assert keys == ["000000", "000001", "000010", "000011", "000020"]
    assert [len(pq.read_table(p)) for p in sorted((tmp_path / "a").glob("*.parquet"))] == [2, 2, 1]
    for name in ("00000.tar", "00002.tar", "00001.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_interrupted_shard_has_no_stats(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path) as writer:
        writer.write(encode_image(_image("red")), "x", size=(12, 8))
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("*_stats.json"))
