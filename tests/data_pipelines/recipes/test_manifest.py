"""The manifest: sources as ``SourceConfig`` takes them, paths made absolute."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.recipes import manifest
from data_pipelines.recipes.jsonl import write_jsonl


def test_sources_are_what_a_config_takes() -> None:
    pairs = manifest.pair_source("a", "s1_2/a", "say", captions="s1_2/a/captions.jsonl", weight=0.5)
    assert SourceConfig(**pairs) == SourceConfig(
        "a", {"kind": "tar", "paths": ["s1_2/a/*.tar"], "captions": "s1_2/a/captions.jsonl"}, 0.5, ["say"]
    )
    assert manifest.pair_source("a", "x", "say") == {
        "name": "a", "spec": {"kind": "tar", "paths": ["x/*.tar"]}, "prompts": ["say"],
    }  # fmt: skip
    assert manifest.text_source("t", "t.txt") == {"name": "t", "spec": {"kind": "text", "paths": ["t.txt"]}}
    assert manifest.conversation_source("c", "c.jsonl") == {
        "name": "c",
        "spec": {"kind": "jsonl", "paths": ["c.jsonl"]},
    }
    assert manifest.conversation_source("c", "c.jsonl", "images")["spec"]["image_root"] == "images"


def test_the_majority_answer_is_named(tmp_path: Path) -> None:
    answers = ["yes", "no", "yes", "two"]
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}] for answer in answers]
    write_jsonl(tmp_path / "heldout/q.jsonl", ({"conversations": turn} for turn in turns))
    entry = {"path": "heldout/q.jsonl", "image_root": "heldout/images", "samples": 4}
    assert manifest.heldout_entry(tmp_path, "heldout/q.jsonl", with_majority=False) == entry
    entry |= {"majority_answer": "yes", "majority_accuracy": 0.5}
    assert manifest.heldout_entry(tmp_path, "heldout/q.jsonl", with_majority=True) == entry


def test_paths_are_made_absolute(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing: build the sets first"):
        manifest.load_manifest(tmp_path)
    samples = dict.fromkeys(manifest.STAGES, 0)
    source = manifest.conversation_source("text", "s2/a.jsonl", "s2/images")
    sources = {stage: [source] for stage in manifest.STAGES}
    entries = manifest.stage_entries(samples, sources)
    manifest.write_manifest(tmp_path, {"tokenizer": "tokenizer", "stages": entries, "heldout": {"text": "h.txt"}})
    loaded = manifest.load_manifest(tmp_path)
    assert loaded["tokenizer"] == str(tmp_path / "tokenizer")
    assert loaded["heldout"]["text"] == str(tmp_path / "h.txt")
    assert loaded["stages"]["s2"]["sources"][0] == {
        "name": "text",  # no path, though a key of that name is one
        "spec": {"kind": "jsonl", "paths": [str(tmp_path / "s2/a.jsonl")], "image_root": str(tmp_path / "s2/images")},
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"stages": {}}', b"[" * 100_000])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: damaged: remove it and build the sets again") as caught:
        manifest.load_manifest(tmp_path)
    assert "\n" not in str(caught.value)
