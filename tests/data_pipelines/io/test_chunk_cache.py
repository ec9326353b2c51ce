"""The cache of remote files where its disk fails."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data_pipelines.io import blobs, chunk_cache, publish


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_remote_data_are_read_without_a_cache_disk(tmp_path: Path, monkeypatch, caplog, fault: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/cacheless/a.bin", bytes(range(100)))
    if fault == "full":
        cache = chunk_cache.ChunkCache(tmp_path / "remote", 1 << 20)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(publish, "write_bytes", full)
    else:
        (tmp_path / "remote").write_bytes(b"")
        cache = chunk_cache.ChunkCache(tmp_path / "remote", 1 << 20)
    monkeypatch.setattr(chunk_cache, "_current", cache)
    for start in (0, 50):
        assert blobs.Blob("memory://cacheless/a.bin").read(start, 10) == bytes(range(start, start + 10))
    assert len(caplog.records) == 1 and "remote data is not kept there" in caplog.text
    fs.rm("/cacheless", recursive=True)


@pytest.mark.parametrize("length", [0, 7, 99])
def test_pieces_that_were_cut_are_fetched_again(tmp_path: Path, monkeypatch, length: int) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/cut/a.bin", bytes(range(100)))
    monkeypatch.setattr(chunk_cache, "_current", chunk_cache.ChunkCache(tmp_path / "remote", 1 << 20))
    blob = blobs.Blob("memory://cut/a.bin")
    assert blob.read(90, 10) == bytes(range(90, 100))
    (piece,) = (path for path in (tmp_path / "remote").iterdir() if path.is_file())
    piece.write_bytes(piece.read_bytes()[:length])
    assert blob.read(90, 10) == bytes(range(90, 100))
    assert piece.stat().st_size == 100
    fs.rm("/cut", recursive=True)
