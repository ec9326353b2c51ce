"""Reading files: any places, in one pass, or whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import DataError
from data_pipelines.io import blobs

DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(params=["local", "remote"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "local":
        (tmp_path / "a").write_bytes(DATA)
        yield str(tmp_path / "a")
        return
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/blobs/a", DATA)
    yield "memory://blobs/a"
    fs.rm("/blobs", recursive=True)


def test_places(path: str) -> None:
    blob = blobs.Blob(path)
    assert blob.size == len(DATA)
    assert blob.read(5, 10) == DATA[5:15]
    assert blob.read(len(DATA) - 5, 10) == DATA[-5:]
    assert blob.read(5, 0) == b""
    places = [(200_000, 7), (10, 20), (0, 5), (25, 100), (len(DATA) - 3, 3)]
    assert blob.read_all(places) == [DATA[offset : offset + length] for offset, length in places]


def test_neighbours_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/neighbours/a", DATA)
    blob, requests = blobs.Blob("memory://neighbours/a"), []
    monkeypatch.setattr(blob, "fetch", lambda *span, real=blob.fetch: requests.append(span) or real(*span))
    blob.read_all([(100, 10), (0, 10), (200_000, 10)])
    assert requests == [(0, 110), (200_000, 200_010)]
    fs.rm("/neighbours", recursive=True)


def test_one_pass_and_whole_files(path: str) -> None:
    with blobs.scan_view(path) as view:
        assert view.size == len(DATA)
        assert (view.read(0, 4), view.read(7, 4), view.read(len(DATA) - 1, 4)) == (DATA[:4], DATA[7:11], DATA[-1:])
        assert view.read(len(DATA), 4) == b""
    with blobs.open_file(path) as file:
        file.seek(3)
        assert file.read(3) == DATA[3:6]
    assert blobs.read_bytes(path) == DATA
    assert blobs.read_bytes(path, 7) == DATA[:7]


def test_missing_files(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(DataError, match="none"):
        blobs.Blob(missing)
    with pytest.raises(DataError, match="none"), blobs.scan_view(missing):
        raise AssertionError("not reached")
    for path in (missing, "memory://none"):
        with pytest.raises(DataError, match="none"):
            blobs.read_bytes(path)
