"""ArrayRecord files."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import BadSample
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.containers.array_record import pack, split, unpack
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_array_record(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    samples = [
        RawSample("a", (encoded(),), "words"),
        RawSample("b", (), conversations=(("human", "é?"), ("gpt", "!"))),
        RawSample("c", text="plain"),
    ]
    path = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for sample in samples:
        writer.write(pack(sample, {"tokens": [1, 2]}))
    writer.write(b"something else")
    writer.close()
    source = open_source({"kind": "array_record", "paths": str(path)})
    assert [source.read(i) for i in range(3)] == [
        RawSample(f"a/{s.key}", s.images, s.caption, s.conversations, s.text) for s in samples
    ]
    assert source.dropped() == {"bad_record": 1}
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/a.array_record", path.read_bytes())
    remote = open_source({"kind": "array_record", "paths": "memory://bucket/a.array_record"})
    assert [remote.read(i) for i in range(3)] == [source.read(i) for i in range(3)]
    fs.rm("/bucket", recursive=True)
    assert unpack(pack(samples[0], {"tokens": [1, 2]}))[0]["tokens"] == [1, 2]
    with pytest.raises(BadSample, match="bad_record"):
        split(pack(samples[0])[:-1])
