"""The local folder that mirrors a workdir in a bucket."""

from __future__ import annotations

import pytest

from data_pipelines.errors import StorageError
from mono_jax.storage.mirror import Mirror


def test_what_changes_is_stored_and_comes_back_elsewhere(bucket, stores, tmp_path):
    large = ["checkpoints", "base", "s2/checkpoints"]
    for name in ("checkpoints/300/x", "base/b", "s2/checkpoints/y", "s2-old.txt", ".lock", "metrics.jsonl"):
        (bucket / name).write_text(name)
    mirror = Mirror(bucket, tmp_path / "a", large)
    mirror.pull()
    found = sorted(str(file.relative_to(mirror.files)) for file in mirror.files.rglob("*") if file.is_file())
    assert found == ["metrics.jsonl", "s2-old.txt"]
    requests = stores(bucket.scheme).requests
    requests.clear()
    mirror.push()
    assert requests == []  # nothing changed
    with (mirror.files / "metrics.jsonl").open("a") as file:
        file.write(" and more")
    (mirror.files / "s2").mkdir()
    (mirror.files / "s2/summary.json").write_text("{}")
    (mirror.files / f"half.{'0' * 32}.tmp").write_text("unfinished")
    (mirror.files / "s2-old.txt").unlink()
    mirror.push()
    assert bucket.objects(without=["checkpoints", "base"]) == [
        ".lock", "metrics.jsonl", "s2/checkpoints/y", "s2/summary.json"
    ]  # fmt: skip
    other = Mirror(bucket, tmp_path / "b", large)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/stale").write_text("of a run that was killed")
    other.pull()
    found = {str(f.relative_to(other.files)): f.read_text() for f in other.files.rglob("*") if f.is_file()}
    assert found == {"metrics.jsonl": "metrics.jsonl and more", "s2/summary.json": "{}"}


def test_what_could_not_be_stored_is_stored_the_next_time(bucket, stores, tmp_path):
    mirror = Mirror(bucket, tmp_path / "a", [])
    mirror.pull()
    (mirror.files / "x").write_text("1")
    stores(bucket.scheme).fault = lambda method, path: 503
    with pytest.raises(StorageError):
        mirror.push()
    stores(bucket.scheme).fault = lambda method, path: None
    mirror.push()
    assert (bucket / "x").read_text() == "1"


def test_each_process_stores_what_it_changed_itself(bucket, tmp_path):
    first, second = (Mirror(bucket, tmp_path / name, []) for name in "ab")
    for mirror in (first, second):
        mirror.pull()
    (first.files / "metrics.jsonl").write_text("1")
    (second.files / "log-1").write_text("2")
    for mirror in (first, second, first, second):
        mirror.push()
    assert bucket.objects() == ["log-1", "metrics.jsonl"]
