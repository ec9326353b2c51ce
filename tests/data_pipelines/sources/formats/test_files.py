"""Folders of loose files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, keys, pairs


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_loose_files(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        (tmp_path / "out" / shard).mkdir(parents=True)
        for name, data in pairs(2):
            (tmp_path / "out" / shard / name).write_bytes(data)
        (tmp_path / "out" / f"{shard}_stats.json").write_text('{"successes": 2}')
        (tmp_path / "out" / f"{shard}.parquet").write_bytes(b"metadata")
    (tmp_path / "out" / "00001" / "00001.txt").write_bytes(b"")
    source = open_source({"kind": "files", "paths": str(tmp_path / "out")})
    assert keys(source) == ["00000/00000", "00000/00001", "00001/00000"]
    assert source.read(1).images == (encoded(41, 30, seed=1),)
    assert source.dropped() == {"no_caption": 1}
    (tmp_path / "out" / "00001" / "00001.txt").write_bytes(b"now there")
    assert len(open_source({"kind": "files", "paths": str(tmp_path / "out")})) == 4
