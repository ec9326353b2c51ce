"""Objects as paths: they behave in a bucket as pathlib does on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.errors import StorageError
from data_pipelines.io import storage
from mono_jax.errors import ConfigError
from mono_jax.storage import objects
from mono_jax.storage.objects import MISSING, ObjectPath
from mono_jax.storage.places import local_copy, place_of
from tests.stores import Store


@pytest.fixture(params=["s3", "gs"])
def store(request, stores, monkeypatch):
    monkeypatch.setattr(storage, "_patience", storage.Patience(1, 0.0, 0.01))
    with stores(request.param).found() as found:
        yield found


@pytest.mark.parametrize("bad", ["http://host/x", "s3://", "gs:///x", "hdfs://a/b"])
def test_other_urls_are_no_places(bad):
    with pytest.raises(ConfigError, match="not a place to keep files"):
        place_of(bad)


def test_an_object_is_no_local_path():
    with pytest.raises(TypeError):
        Path(ObjectPath("gs://b/x"))


def test_paths(tmp_path):
    path = ObjectPath("s3://b/a//run/")
    assert str(path / "model/x.json") == "s3://b/a/run/model/x.json"
    assert ((path / "x").parent, (path / "x").name) == (path, "x")
    assert str(ObjectPath("s3://b/x").parent) == "s3://b"
    assert place_of(f"file://{tmp_path}") == tmp_path


def test_writing_reading_listing_removing(store: Store, tmp_path):
    """A bucket and a local folder give the same answers."""
    for folder in (store.folder("w"), tmp_path / "w"):
        (folder / "a b").mkdir(parents=True, exist_ok=True)
        for name in ("a b/layers[0:2].x/0.0", "c.json", "a-b"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(name.encode())
        assert (folder / "c.json").read_text() == "c.json"
        assert sorted(file.name for file in folder.iterdir()) == ["a b", "a-b", "c.json"]
        assert [str(file.relative_to(folder)) for file in folder.glob("a b/*/0.0")] == ["a b/layers[0:2].x/0.0"]
        assert [file.name for file in folder.rglob("*.json")] == ["c.json"]
        assert [(folder / n).is_dir() for n in ("a b", "a", "c.json", "x")] == [True, False, False, False]
        assert [(folder / n).is_file() for n in ("a b", "a", "c.json", "x")] == [False, False, True, False]
        (folder / "c.json").unlink()
        (folder / "c.json").unlink(missing_ok=True)
        for read in ((folder / "c.json").read_bytes, (folder / "c.json").unlink):
            with pytest.raises(FileNotFoundError):
                read()
    store.folder("w/a").remove_below()  # not "a b" nor "a-b"
    assert store.folder("w").objects() == ["a b/layers[0:2].x/0.0", "a-b"]
    assert store.folder("w").objects(without=["a", "a b", "c"]) == ["a-b"]
    store.folder("w").remove_below()
    assert not store.folder("w").exists()


def test_writes_on_a_condition(store: Store):
    file = store.folder("c/lock")
    file.unlink(missing_ok=True)
    first = file.write_if(b"1", MISSING)
    assert first and file.write_if(b"2", MISSING) is None
    second = file.write_if(b"3", first)
    assert second and file.write_if(b"4", first) is None
    assert file.read_generation() == (b"3", second)
    assert file.write_if(None, first) is None and file.is_file()
    assert file.write_if(None, second) and not file.is_file()


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25])
def test_large_objects_come_in_parts_and_once(store: Store, tmp_path, monkeypatch, size: int):
    monkeypatch.setattr(objects, "_PART", 10)
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path))
    content = bytes(range(size))
    store.folder(f"m{size}/x").write_bytes(content)
    folder = local_copy(store.folder(f"m{size}"), ["x"])
    assert (folder / "x").read_bytes() == content
    (folder / "x").write_bytes(b"as it was")  # seen if it is not fetched
    assert (local_copy(store.folder(f"m{size}"), ["x"]) / "x").read_bytes() == b"as it was"
    store.folder(f"m{size}/x").write_bytes(content + b"!")
    assert (local_copy(store.folder(f"m{size}"), ["x"]) / "x").read_bytes() == content + b"!"


def test_what_storage_does_not_answer_is_one_line(store: Store):
    file = store.folder("f/x")
    file.write_bytes(b"x")
    store.fault = lambda method, path: 503
    for ask in (file.read_bytes, file.is_file, lambda: file.write_bytes(b"y"), store.folder("f").remove_below):
        with pytest.raises(StorageError) as caught:
            ask()
        assert str(caught.value).startswith(f"{store.scheme}://bucket/f") and "\n" not in str(caught.value)
    store.fault = lambda method, path: 403
    store.requests.clear()
    with pytest.raises(StorageError, match=r"access denied: .* \(HTTP 403\): check your credentials"):
        file.write_bytes(b"y")
    assert len(store.requests) == 1  # a retry would not help
    store.fault = lambda method, path: None
    with pytest.raises(StorageError, match="check the bucket's name"):
        ObjectPath(f"{store.scheme}://no-such-bucket/x").write_bytes(b"")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_without_credentials(scheme, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_CONFIG_FILE", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    objects.forget_buckets()
    with pytest.raises(StorageError, match=r"^(s3|gs)://nobody: no credentials: (set AWS|run 'gcloud)"):
        ObjectPath(f"{scheme}://nobody/x").read_bytes()
