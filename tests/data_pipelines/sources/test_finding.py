"""Shards among paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.finding import kind_of, make_shard, shard_names, shards_of
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, write_jsonl, write_tar


def test_kinds_by_name(tmp_path: Path) -> None:
    kinds = {"a.tar": "tar", "a.parquet": "parquet", "a.JSON": "jsonl", "a.array_record-00000-of-00002": "array_record"}
    for name, kind in {**kinds, "a.md": "text"}.items():
        assert kind_of(str(tmp_path / name)) == kind
    assert kind_of(str(tmp_path)) == "files"
    (tmp_path / "dataset_info.json").write_text("{}")
    assert kind_of(str(tmp_path)) == "tfds"
    with pytest.raises(DataError, match=r"unknown kind of shard; give a folder or one of \.tar, "):
        kind_of("a.xyz")


def test_folders_stand_for_what_is_in_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", pairs(1))
    (tmp_path / "00000.parquet").write_bytes(b"its metadata")
    (tmp_path / "b.parquet").write_bytes(b"")
    write_jsonl(tmp_path / "c.jsonl", {"text": "a"})
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "x.jpg").write_bytes(encoded())
    found = [(shard.kind, Path(shard.path).name) for shard in shards_of([str(tmp_path)], None, {"split": "x"})]
    assert found == [("tar", "00000.tar"), ("parquet", "b.parquet"), ("jsonl", "c.jsonl"), ("files", "loose")]
    assert len(shards_of([str(tmp_path / "*.tar")] * 2, None, {})) == 1
    for name in ("a.xyz", "b.xyz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"\*\.xyz: no shards found"):
        shards_of([str(tmp_path / "*.xyz")], None, {})


@pytest.mark.parametrize("kind", ["tar", "jsonl", "text"])
def test_a_folder_stands_for_the_files_of_its_kind(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "below").mkdir(parents=True)
    write_tar(folder / "below" / "a.tar", pairs(2))
    write_jsonl(folder / "a.jsonl", {"text": "words"})
    (folder / "a.txt").write_text("words")
    source = open_source({"kind": kind, "paths": str(folder)})
    assert len(source) == {"tar": 2, "jsonl": 1, "text": 1}[kind]
    with pytest.raises(DataError, match=r"set: a folder without files of kind 'array_record' \(\.array_record, "):
        open_source({"kind": "array_record", "paths": str(folder)})


def test_options_of_other_kinds_are_left_out() -> None:
    shard = make_shard("text", "a.txt", chunk_bytes=100, split="train", hash_images=True)
    assert shard.options.given() == {"chunk_bytes": 100}
    assert make_shard("tar", "a.tar", caption_key=None, hash_images=False).options.given() == {}


def test_names_in_keys() -> None:
    assert shard_names(["x/a.tar", "x/b.parquet", "c.jsonl"]) == ["a", "b", "c.jsonl"]
    assert shard_names(["r/x/0.tar", "r/y/0.tar"]) == ["x/0", "y/0"]
    assert shard_names(["r/a.jsonl", "r/a.jsonl"]) == ["a.jsonl", "a.jsonl~2"]
