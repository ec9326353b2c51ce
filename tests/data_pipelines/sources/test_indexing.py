"""Where indices are kept, and when they are made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.io import copies
from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import pairs, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_stale_and_damaged_indices_are_made_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(2))
    spec = {"kind": "tar", "paths": str(path)}
    assert len(open_source(spec)) == 2
    index = tmp_path / "a.tar.index.npz"
    assert index.exists()
    write_tar(path, pairs(4))
    close_blobs()
    assert len(open_source(spec)) == 4
    index.write_bytes(index.read_bytes()[:100])
    assert len(open_source(spec)) == 4
    index.write_bytes(b"no zip")
    assert [open_source(spec).read(i).caption for i in range(4)] == [f"caption {i}" for i in range(4)]


def test_index_goes_to_the_cache_where_shards_cannot_be_written_to(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(1))
    write = copies.write_bytes

    def refuse(place: str, data: bytes) -> None:
        if place.startswith(str(tmp_path / "a.tar")):
            raise PermissionError("read-only")
        write(place, data)

    monkeypatch.setattr(copies, "write_bytes", refuse)
    open_source({"kind": "tar", "paths": str(path)})
    assert not (tmp_path / "a.tar.index.npz").exists()
    assert len(list((tmp_path / "cache" / "index").glob("*-a.tar.index.npz"))) == 1
    open_source({"kind": "tar", "paths": str(path), "index_dir": str(tmp_path / "own")})
    assert len(list((tmp_path / "own").glob("*-a.tar.index.npz"))) == 1
