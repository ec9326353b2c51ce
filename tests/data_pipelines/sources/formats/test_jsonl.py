"""Instruction data: lines, lists and meta files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import load_or_make
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, keys, write_jsonl


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_llava_jsonl(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.jpg").write_bytes(encoded(12, 34, orientation=6))
    path = write_jsonl(
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
    write_jsonl(tmp_path / "lines.jsonl", *records)
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


@pytest.mark.parametrize("lines", [3, 3000])
@pytest.mark.parametrize("pictures", ["pictures", None])
def test_images_that_arrive_or_change_are_noticed(tmp_path: Path, lines: int, pictures: str | None) -> None:
    root = tmp_path / (pictures or "")
    root.mkdir(exist_ok=True)
    talk = [{"from": "human", "value": "<image>\n?" + "long " * 200}, {"from": "gpt", "value": "!"}]
    records = [{"image": [f"{i % 3}.jpg"], "conversations": talk} for i in range(lines)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"image_root": str(root)} if pictures else {}
    shard = make_shard("jsonl", str(tmp_path / "a.jsonl"), **options)
    (root / "0.jpg").write_bytes(encoded(40, 30))
    index, made = load_or_make(shard)
    assert made and index.dropped() == {"missing_image": lines - len(index.usable)}
    assert not load_or_make(shard)[1]
    for i in (1, 2):
        (root / f"{i}.jpg").write_bytes(encoded(40, 30))
    index, made = load_or_make(shard)
    assert made and len(index.usable) == lines
    (root / "1.jpg").write_bytes(encoded(64, 30))
    assert load_or_make(shard)[1] and not load_or_make(shard)[1]
    (root / "unrelated.jpg").write_bytes(b"")
    assert not load_or_make(shard)[1]
