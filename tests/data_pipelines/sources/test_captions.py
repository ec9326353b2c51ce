"""Captions joined to shards by key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources import caption_files
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, pairs, write_jsonl, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


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
    same = write_jsonl(
        tmp_path / "c.jsonl", {"key": "00000", "caption": "old"}, {"00000": "ény", "00001": "one", "b/00000": "of b"}
    )
    assert open_source({**spec, "captions": str(same)}).fingerprint() == source.fingerprint()
    longer = open_source({**spec, "captions": str(same), "filters": {"min_caption_chars": 4}})
    assert [longer.read_text(i).caption for i in range(len(longer))] == ["of b"]  # filters see the joined captions
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"c\.jsonl:1: not JSON"):
        open_source({**spec, "captions": str(tmp_path / "c.jsonl")})


def test_broken_lines_of_captions_are_left_out(tmp_path: Path, monkeypatch, caplog) -> None:
    write_tar(tmp_path / "a.tar", pairs(4))
    monkeypatch.setattr(caption_files, "_MAX_LINE", 200)
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


def test_captions_wrap_sources_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded())
    lines = write_jsonl(
        tmp_path / "chat.jsonl", {"image": "x.jpg", "conversations": TALK}, {"text": "no image"}, {"image": "x.jpg"}
    )
    pq.write_table(
        pa.table({"key": ["1", "2"], "jpg": [encoded(), None], "caption": ["", "b"]}), tmp_path / "p.parquet"
    )
    joined = write_jsonl(tmp_path / "c.jsonl", {"1": "joined one", "2": "joined two"})
    for kind, path, key, dropped in (
        ("jsonl", lines, "chat.jsonl:1", {"no_image": 1, "no_caption": 1}),
        ("parquet", tmp_path / "p.parquet", "p/1", {"no_image": 1}),
    ):
        source = open_source({"kind": kind, "paths": str(path), "captions": str(joined)})
        assert (len(source), source.dropped()) == (1, dropped)
        assert source.read(0) == RawSample(key, (encoded(),), "joined one")
        assert source.read_text(0) == RawSample(key, (), "joined one")
        assert source.read_images(0) == RawSample(key, (encoded(),))
        assert source.key(0) == key and source.image_sizes(np.array([0]))[1].tolist() == [[40, 30]]
        assert pickle.loads(pickle.dumps(source)).read(0) == source.read(0)
