"""Sources that are not on the local disk."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import DataError
from data_pipelines.io.blobs import close_blobs
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, keys, pairs, tar_bytes, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_memory_file_system(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/shards/00000.tar", tar_bytes(pairs(3)))
    fs.pipe_file("/bucket/shards/00001.tar", tar_bytes(pairs(2)))
    fs.pipe_file("/bucket/captions.jsonl", b'{"00000": "joined"}')
    fs.pipe_file("/bucket/photos/x.jpg", encoded())
    fs.pipe_file("/bucket/chat.jsonl", json.dumps({"image": "photos/x.jpg", "conversations": TALK}).encode())
    fs.pipe_file("/bucket/loose/k.jpg", encoded())
    fs.pipe_file("/bucket/loose/k.txt", b"loose words")
    try:
        source = open_source({"kind": "tar", "paths": "memory://bucket/shards/*.tar"})
        assert keys(source) == ["00000/00000", "00000/00001", "00000/00002", "00001/00000", "00001/00001"]
        assert source.read(4).images == (encoded(41, 30, seed=1),)
        assert fs.exists("/bucket/shards/00000.tar.index.npz")
        local = tmp_path / "00000.tar"
        write_tar(local, pairs(3))
        write_tar(tmp_path / "00001.tar", pairs(2))
        assert open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")}).fingerprint() == source.fingerprint()
        joined = {"kind": "tar", "paths": "memory://bucket/shards/*.tar", "captions": "memory://bucket/captions.jsonl"}
        assert len(open_source(joined)) == 2
        assert open_source({"kind": "jsonl", "paths": "memory://bucket/chat.jsonl"}).read(0).images == (encoded(),)
        loose = open_source({"kind": "files", "paths": "memory://bucket/loose"})
        assert (loose.read(0).caption, loose.read(0).images) == ("loose words", (encoded(),))
        with pytest.raises(DataError, match="bucket"):
            open_source({"kind": "tar", "paths": "memory://bucket/none-*.tar"})
    finally:
        fs.rm("/bucket", recursive=True)
        close_blobs()


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows byte ranges, as object stores do."""

    def do_GET(self) -> None:
        if not self._file().is_file():
            self.send_error(404)
            return
        data = self._file().read_bytes()
        start, end = 0, len(data) - 1
        if given := self.headers.get("Range"):
            first, last = given.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[start : end + 1])

    def do_HEAD(self) -> None:
        if not self._file().is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self._file().stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def _file(self) -> Path:
        return Path(self.directory) / self.path.lstrip("/")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "www").mkdir()
    handler = functools.partial(_Ranges, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_http_is_read_by_ranges_and_indexed_in_the_cache(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")
    write_tar(tmp_path / "www" / "a.tar", pairs(3))
    source = open_source({"kind": "tar", "paths": f"{server}/a.tar"})
    assert source.read(2).images == (encoded(42, 30, seed=2),)
    assert len(list((tmp_path / "cache" / "index").glob("*a.tar.index.npz"))) == 1
