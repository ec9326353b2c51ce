"""Paths and URLs: globs, folders, stamps."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import paths


def test_globs_and_braces(tmp_path: Path) -> None:
    names = ["000.tar", "001.tar", "002.tar", "a[1].tar", "x.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = paths.expand([tmp_path / "{001..002}.tar", str(tmp_path / "*.tar")])
    assert [paths.basename(path) for path in found] == ["001.tar", "002.tar", "000.tar", "a[1].tar"]
    assert paths.expand(str(tmp_path / "a[1].tar")) == [str(tmp_path / "a[1].tar")]  # a name before it is a pattern
    assert paths.expand(f"file://{tmp_path}/x.txt") == [str(tmp_path / "x.txt")]
    with pytest.raises(DataError, match=r"003\.tar: no such file"):
        paths.expand(str(tmp_path / "{002..003}.tar"))


def test_parts_of_paths() -> None:
    assert paths.join("a/", "b") == "a/b" and paths.join("", "b") == "b"
    assert paths.join("a", "/b") == "/b" and paths.join("a", "s3://b") == "s3://b"
    assert [paths.parent(path) for path in ("a/b/", "b", "/b")] == ["a", "", "/"]
    assert paths.basename("a/b/") == "b"
    assert [paths.is_remote(path) for path in ("s3://a", "file://a", "/a", "zip::s3://a")] == [True, False, False, True]


def test_folders(tmp_path: Path) -> None:
    for name in ("a/x", "a/b/y", ".hidden/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    assert paths.walk(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert [(name, size) for name, size, _ in paths.list_dir(str(tmp_path / "a"))] == [("x", 2)]
    with pytest.raises(DataError, match="cannot be listed"):
        paths.list_dir(str(tmp_path / "none"))


def test_stamps_change_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    first = paths.stamp(str(file))
    assert paths.list_dir(str(tmp_path))[0][2] == first
    os.utime(file, (1, 1))
    assert paths.stamp(str(file)) != first
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/stamps/a", b"1")
    first = paths.stamp("memory://stamps/a")
    fs.pipe_file("/stamps/a", b"12")
    assert paths.stamp("memory://stamps/a") != first
    fs.rm("/stamps", recursive=True)
    with pytest.raises(StorageError):
        paths.stamp("memory://stamps/a")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("data/real/x", "elsewhere/deep/y"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "data" / "linked").symlink_to("../elsewhere")
    (tmp_path / "data" / "a_second_name").symlink_to("real")  # of a folder that is found without it
    (tmp_path / "elsewhere" / "round").symlink_to("../data")
    (tmp_path / "data" / "nowhere").symlink_to("gone")
    found = paths.walk(str(tmp_path / "data"))
    assert found == [str(tmp_path / "data" / name) for name in ("", "linked/deep", "real")] or found == [
        str(tmp_path / "data" / name) for name in ("linked/deep", "real")
    ]


def test_braces_in_names_are_part_of_them(tmp_path: Path) -> None:
    for folder in ("{a}", "{a,b}", "x{1..2}"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(b"")
        for pattern in ("", "/0.tar", "/*.tar"):
            path = str(tmp_path / folder) + pattern
            assert paths.expand(path) == [path.replace("*", "0")]
    assert len(paths.expand(str(tmp_path / "{a}" / "{0,0}.tar"))) == 1


def test_colons_do_not_make_an_address() -> None:
    assert not paths.is_remote("data::x.jpg") and paths.is_remote("simplecache::http://x/y.jpg")
