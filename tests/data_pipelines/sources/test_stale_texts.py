"""Whatever decides a sample's tokens decides the identity of its source, so that nothing stale is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.loading.packed_data import PackedData
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, write_jsonl, write_tar
from tests.made_sets import config, packed

HUMAN, GPT = {"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a square."}
CONVERSATIONS = [
    [HUMAN, GPT, HUMAN, GPT],
    [HUMAN, GPT, HUMAN | {"from": "gpt"}, GPT | {"from": "human"}],
    [{"from": "system", "value": "what is it?"}, GPT | {"from": "human"}, HUMAN | {"from": "gpt"}, GPT],
]


def _write(kind: str, folder: Path, record: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / "a.jpg").write_bytes(encoded())
        return str(write_jsonl(folder / "a.jsonl", {"image": "a.jpg", **record}))
    if kind == "parquet":
        pq.write_table(pa.table({"image": [encoded()], **{k: [v] for k, v in record.items()}}), folder / "a.parquet")
        return str(folder / "a.parquet")
    members = [("a.jpg", encoded()), ("a.json", json.dumps(record).encode())]
    if kind == "tar":
        return str(write_tar(folder / "a.tar", members))
    for name, data in members:
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "files"])
def test_identity_has_speakers_and_form(kind: str, tmp_path: Path) -> None:
    fingerprints = []
    for turns in CONVERSATIONS:  # of equal size and words
        path = _write(kind, tmp_path / "data", {"conversations": turns})
        fingerprints.append(open_source({"kind": kind, "paths": path}).fingerprint())
    fingerprints.append(
        open_source({"kind": kind, "paths": _write(kind, tmp_path / "data", {"text": "t"})}).fingerprint()
    )
    path = _write(kind, tmp_path / "data", {"text": "a dog", "other": "a cat"})
    sources = [open_source({"kind": kind, "paths": path, "caption_key": key}) for key in ("text", "other")]
    assert [source.read(0).caption for source in sources] == ["a dog", "a cat"]
    fingerprints += [source.fingerprint() for source in sources]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_set_corrected_in_place_is_counted_again(tmp_path: Path, golden_dir: Path) -> None:
    """The same words by other speakers: another number of tokens under an equal name."""
    words = ["where is the square in this question?", "in the corner.", "and the circle?"]

    def opened(*speakers: str) -> PackedData:
        turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, words)]
        path = write_jsonl(tmp_path / "a.jsonl", {"conversations": turns}, {"conversations": turns})
        source = {"name": "talk", "spec": {"kind": "jsonl", "paths": str(path)}}
        return packed(config(golden_dir, source), tmp_path / "kept")

    wrong, right = opened("system", "human", "gpt"), opened("human", "gpt", "human")
    assert right.batch(0)["loss_weights"].any() and right.report.skipped == {}
    assert wrong.identity != right.identity
