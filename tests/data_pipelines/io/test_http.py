"""A web server that answers 503 and 404: only one of them says something about a file."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs, storage
from data_pipelines.sources.indices.shard_index import UNASKED
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, write_jsonl

pytest.importorskip("aiohttp", reason="needs aiohttp (pip install -e .[dev])")


class Server:
    """``failing``: how often each name is still answered by 503; ``asked``: requests by name."""

    def __init__(self) -> None:
        self.failing: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.url = ""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    state = Server()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, directory=str(tmp_path), **named)

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            state.asked[name] += 1
            if state.failing[name] > 0:
                state.failing[name] -= 1
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{running.server_port}"
    yield state
    running.shutdown()
    running.server_close()


def test_images_on_a_web_server(server: Server, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(40 + i, 30, seed=i))
    path = write_jsonl(tmp_path / "a.jsonl", *({"image": f"{i}.jpg", "conversations": TALK} for i in range(7)))
    spec = {"kind": "jsonl", "paths": str(path), "image_root": server.url}
    storage.set_patience(storage.Patience(retries=2, first_pause=0.01))
    server.failing.update({"1.jpg": 2, "4.jpg": 1000})  # one answers in the end
    source = open_source(spec)
    assert source.dropped() == {UNASKED: 1, "missing_image": 1}
    server.failing.clear()
    source = open_source(spec)
    assert source.dropped() == {"missing_image": 1} and len(source) == 6
    assert [source.read(i).images for i in range(6)] == [(encoded(40 + i, 30, seed=i),) for i in range(6)]
    server.failing["2.jpg"] = 2
    assert source.read(2).images == (encoded(42, 30, seed=2),)
    server.failing["2.jpg"] = 1000
    with pytest.raises(StorageError, match=rf"^{server.url}/2\.jpg: .*503"):
        source.read(2)
    (tmp_path / "3.jpg").unlink()
    blobs.close_blobs()
    with pytest.raises(StorageError, match=rf"^{server.url}/3\.jpg: ") as error:
        source.read(3)
    assert error.value.missing
