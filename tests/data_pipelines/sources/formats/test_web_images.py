"""Images at addresses in the web: asked for in parallel, and a host that is gone does not end anything."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs
from data_pipelines.io.storage import Questions
from data_pipelines.sources.formats import jsonl
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, write_jsonl


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_dead_hosts_and_living_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    asked, running, most, lock, read = [], 0, 0, threading.Lock(), blobs.read_bytes

    def fetch(path: str, limit: int | None = None) -> bytes:
        nonlocal running, most
        if not path.startswith("http"):
            return read(path, limit)
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.02)
        with lock:
            running -= 1
            asked.append(path)
        if "dead" in path:
            raise StorageError(path, "no such host")
        if path.endswith("9.jpg"):
            raise StorageError(path, "404", missing=True)
        return encoded()

    monkeypatch.setattr(blobs, "read_bytes", fetch)
    monkeypatch.setattr(jsonl, "_PROGRESS_SECONDS", 0.0)
    hosts = ["good.org", "dead.org"]
    records = [{"image": f"http://{hosts[n % 5 == 0]}/{n}.jpg", "caption": f"caption {n}"} for n in range(100)]
    source = open_source({"kind": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", *records))})
    assert source.dropped() == {"could_not_be_asked": 20, "missing_image": 10}
    wanted = [f"caption {n}" for n in range(100) if n % 5 and n % 10 != 9]
    assert [source.read_text(number).caption for number in range(len(source))] == wanted  # in order
    assert most > 8
    assert "100 records and their images read; not usable: " in caplog.text


def test_many_hosts_without_an_answer_are_a_network_that_is_away() -> None:
    questions = Questions()

    def dead() -> bytes:
        raise StorageError("x", "no route")

    for number in range(200):
        with pytest.raises(StorageError) as error:
            questions.ask(dead, f"host{number % 100}.org")
        if error.value.exhausted:
            break
    assert number == 63
