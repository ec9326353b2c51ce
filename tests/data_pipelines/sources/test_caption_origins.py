"""Captions joined by url or sha256, and those that belong to other images than their keys say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, write_jsonl, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def _url(number: int) -> str:
    return f"http://x/{number}.jpg"


def _sha256(number: int) -> str:
    return hashlib.sha256(encoded(seed=number)).hexdigest()


def _shard(folder: Path, kind: str, count: int) -> dict:
    rows = [{"key": f"{n:03d}", "url": _url(n), "sha256": _sha256(n), "caption": f"alt {n}"} for n in range(count)]
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{**row, "jpg": encoded(seed=n)} for n, row in enumerate(rows)]), folder / "a.parquet"
        )
        return {"kind": kind, "paths": str(folder / "a.parquet")}
    members = []
    for number, row in enumerate(rows):
        members += [(f"{row['key']}.jpg", encoded(seed=number)), (f"{row['key']}.json", json.dumps(row).encode())]
    return {"kind": kind, "paths": str(write_tar(folder / "a.tar", members))}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("by", ["url", "sha256"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_captions_without_keys(tmp_path: Path, kind: str, by: str, suffix: str) -> None:
    rows = [{by: {"url": _url, "sha256": _sha256}[by](n), "re_caption": f"new {n}"} for n in (2, 0, 9)]
    path = tmp_path / f"new.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, *rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_source({**_shard(tmp_path, kind, 3), "captions": str(path)})
    assert [source.read(n).caption for n in range(len(source))] == ["new 0", "new 2"]
    assert source.dropped() == {"no_joined_caption": 1} and source.counts()["unused"] == 1


@pytest.mark.parametrize("field", ["url", "sha256"])
def test_captions_of_other_images(tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture) -> None:
    spec, value = _shard(tmp_path, "tar", 200), {"url": _url, "sha256": _sha256}[field]

    def joined(wrong: int) -> dict:
        rows = [{"key": f"{n:03d}", field: value(n + (n < wrong)), "caption": f"new {n}"} for n in range(200)]
        return {**spec, "captions": str(write_jsonl(tmp_path / f"new{wrong}.jsonl", *rows))}

    assert len(open_source(joined(0))) == 200
    source = open_source(joined(1))
    assert source.dropped() == {"caption_of_another_image": 1} and len(source) == 199
    assert "1 joined captions name another url or sha256" in caplog.text
    with pytest.raises(DataError, match="3 of 200 joined captions name another url"):
        open_source(joined(3))
