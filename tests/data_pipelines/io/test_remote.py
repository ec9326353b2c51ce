"""S3, played by moto on the loopback: the requests it gets, their number, and readers in threads, forks and workers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import check, index
from data_pipelines.errors import StorageError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.io import blobs, chunk_cache, paths, storage
from data_pipelines.packing import lengths
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes
from tests.made_sets import config, packed

NEEDED = "needs s3fs, moto[s3], flask and flask-cors (pip install -e .[dev])"
pytest.importorskip("s3fs", reason=NEEDED)
pytest.importorskip("moto", reason=NEEDED)
pytest.importorskip("flask_cors", reason=NEEDED)

SHARDS, SAMPLES = 3, 20


class Server:
    """The server, its requests so far, and a client."""

    def __init__(self, url: str, requests: list[str]):
        self.requests = requests
        self.fs = fsspec.filesystem("s3", endpoint_url=url)

    def count(self, method: str) -> int:
        """Requests of a kind since the last call of ``forget``."""
        return sum(line.startswith(method) for line in self.requests)

    def forget(self) -> None:
        blobs.close_blobs()
        fsspec.filesystem("s3").invalidate_cache()
        self.requests.clear()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, list[str]]]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app, requests = DomainDispatcherApplication(create_backend_app), []

    def counting(environ, start_response):
        requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}")
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, counting, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


@pytest.fixture
def s3(running: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Three shards at s3://bucket/shards, the process's settings such that s3:// means this server."""
    url, requests = running
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "MONO_JAX_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(chunk_cache, "_current", None)
    server = Server(url, requests)
    server.fs.mkdir("bucket")
    for shard in range(SHARDS):
        server.fs.pipe_file(f"bucket/shards/{shard:05d}.tar", tar_bytes(pairs(SAMPLES)))
        server.fs.pipe_file(f"bucket/shards/{shard:05d}_stats.json", json.dumps({"successes": SAMPLES}).encode())
    yield server
    server.fs.rm("bucket", recursive=True)
    server.forget()


SPEC = {"kind": "tar", "paths": "s3://bucket/shards/{00000..00002}.tar"}


def printed(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_commands(s3: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"key": ["a", "b"], "jpg": [encoded(), b"<html>"], "caption": ["words", "more"]})
    with s3.fs.open("bucket/shards/p.parquet", "wb") as file:
        pq.write_table(table, file)
    for made in (SHARDS + 1, 0):
        s3.forget()
        index.main(["s3://bucket/shards", "--workers=1", "--json"])
        found = printed(capsys)
        assert (found["indexed"], found["usable"], found["skipped"]) == (
            made,
            SHARDS * SAMPLES + 1,
            {"not_an_image": 1},
        )
    # Named one by one, the shards are stamped as when they are listed.
    s3.forget()
    index.main(["s3://bucket/shards/00001.tar", "--workers=1", "--json"])
    assert printed(capsys)["indexed"] == 0
    check.main(["s3://bucket/shards", f"--report={tmp_path / 'report'}", "--json"])
    found = printed(capsys)
    assert (found["samples"], found["ok"], found["bad"]) == (
        SHARDS * SAMPLES + 2,
        SHARDS * SAMPLES + 1,
        {"not_an_image": 1},
    )


def test_requests_are_few(s3: Server) -> None:
    open_source(SPEC)
    s3.forget()
    source = open_source(SPEC)
    assert s3.count("HEAD") == 0  # the folder is listed once instead
    assert s3.count("GET") <= SHARDS + 2  # an index each
    s3.requests.clear()
    samples = [source.read(i) for i in range(len(source))]
    assert s3.requests and len(s3.requests) == len(samples)  # image and caption together
    assert [sample.caption for sample in samples[:SAMPLES]] == [f"caption {i}" for i in range(SAMPLES)]
    assert samples[SAMPLES].images == (encoded(),)


def test_texts_are_fetched_several_at_a_time(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SPEC)
    together = threading.Barrier(8)
    real = type(source).read_text

    def meeting(self, number: int):
        if number < 8:
            together.wait(timeout=30)  # breaks, and fails the test, unless eight are read at the same time
        return real(self, number)

    monkeypatch.setattr(type(source), "read_text", meeting)
    texts = [text().caption for text in lengths._texts(source, list(range(len(source))))]
    assert texts == [f"caption {i}" for i in range(SAMPLES)] * SHARDS


def test_long_runs_through_the_local_disk(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_source(SPEC)
    expected = [plain.read(i) for i in range(len(plain))]
    size = s3.fs.size("bucket/shards/00000.tar")
    monkeypatch.setattr(chunk_cache.ChunkCache, "CHUNK", 10_000)
    pieces = -(-size // 10_000)
    source = open_source({**SPEC, "remote_cache_gb": 10 * 10_000 / 1e9})
    s3.requests.clear()
    assert [source.read(i) for i in range(SAMPLES)] == expected[:SAMPLES]
    assert s3.count("GET") <= pieces < SAMPLES
    kept = [file for file in (tmp_path / "remote").iterdir() if file.is_file()]
    assert [source.read(i) for i in range(len(source))] == expected
    after = [file for file in (tmp_path / "remote").iterdir() if file.is_file()]
    assert len(kept) <= 10 and len(after) <= 10 and set(kept) != set(after)  # room was made


def test_failures_are_tried_again_then_raised(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SPEC)
    fs, failures = paths.filesystem("s3://bucket")[0], []
    real = fs.cat_file

    def failing(*arguments, **named):
        failures.append(arguments)
        if len(failures) % 3:
            raise RuntimeError("connection reset")
        return real(*arguments, **named)

    monkeypatch.setattr(fs, "cat_file", failing)
    storage.set_patience(storage.Patience(retries=2, first_pause=0.01))
    assert source.read(0).caption == "caption 0"
    storage.set_patience(storage.Patience(retries=1, first_pause=0.01))
    with pytest.raises(StorageError, match=r"^s3://bucket/shards/00000.tar: .*connection reset"):
        source.read(1)
    s3.fs.rm("bucket/shards/00002.tar")
    with pytest.raises(StorageError, match=r"00002.tar: ") as error:
        source.read(len(source) - 1)
    assert error.value.missing


def _read(data: bytes, results) -> None:
    source = pickle.loads(data)
    results.put([source.read(i).caption for i in range(0, len(source), 7)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking a process with threads is the point
def test_processes_have_clients_of_their_own(s3: Server, method: str) -> None:
    source = open_source(SPEC)
    expected = [source.read(i).caption for i in range(0, len(source), 7)]  # the client is in use before the fork
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_read, args=(pickle.dumps(source), results), daemon=True)
    process.start()
    try:
        assert results.get(timeout=60) == expected
    finally:
        process.kill()
        process.join()


def test_workers_of_the_loader(s3: Server, golden_dir: Path, tmp_path: Path) -> None:
    data = {"name": "pairs", "spec": {**SPEC, "remote_cache_gb": 1}}
    settings = {"batch_size": 2, "min_image_side": 1, "shuffle": "local", "local_runs": 2, "run_length": 4}
    single = packed(config(golden_dir, data, **settings), tmp_path)
    expected = [batch_hash(batch) for _, batch in single.iterate()]
    workers = packed(config(golden_dir, data, **settings, workers=2), tmp_path)
    assert [batch_hash(batch) for _, batch in workers.iterate()] == expected
    assert (workers.report.samples, workers.report.bad) == (SHARDS * SAMPLES, [])
