"""Links, sparse members and what systems leave behind in archives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import load_or_make
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", link: tuple[bytes, str] | None = None, **pax: str) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), pax
    if link is not None:
        info.type, info.linkname = link
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("long", ["", "long/" * 40])
def test_links_lead_to_members_of_the_same_archive(tmp_path: Path, format: int, long: str) -> None:
    links = {
        "1": (tarfile.LNKTYPE, f"{long}im/0.jpg"),
        "2": (tarfile.SYMTYPE, "im/0.jpg"),
        "3": (tarfile.SYMTYPE, "./1.jpg"),  # over another link
        "4": (tarfile.SYMTYPE, "9.jpg"),  # to one that comes later
        "5": (tarfile.SYMTYPE, "../" * 60 + "etc/passwd"),
        "6": (tarfile.SYMTYPE, "/etc/passwd"),
        "7": (tarfile.SYMTYPE, "7.jpg"),
        "8": (tarfile.SYMTYPE, "folder/0.jpg"),  # through a linked folder
    }
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        _add(tar, f"{long}im/0.jpg", encoded(seed=1))
        _add(tar, f"{long}folder", link=(tarfile.SYMTYPE, "im"))
        for key, link in links.items():
            _add(tar, f"{long}{key}.jpg", link=link)
            _add(tar, f"{long}{key}.txt", key.encode())
        _add(tar, f"{long}9.jpg", encoded(seed=2))
        _add(tar, f"{long}9.txt", b"9")
    source = open_source({"kind": "tar", "paths": str(tmp_path / "a.tar")})
    images = {sample.caption: sample.images for sample in map(source.read, range(len(source)))}
    first, last = (encoded(seed=1),), (encoded(seed=2),)
    assert images == {"1": first, "2": first, "3": first, "4": last, "8": first, "9": last}
    assert source.dropped() == {"no_image": 3, "no_caption": 1}
    problems = next(iter(source.problems().values()))
    assert [problem.split(": ")[-1] for problem in problems] == [
        *["leads outside the archive"] * 2,
        "a cycle of links",
    ]


def test_sparse_members_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.bmp"}
        _add(tar, "GNUSparseFile.0/a.bmp", b"1\n0\n512\n", **sparse)
        _add(tar, "a.txt", b"words")
        _add(tar, "b.jpg", encoded())
        _add(tar, "b.txt", b"words")
    index, _ = load_or_make(make_shard("tar", str(tmp_path / "a.tar")))
    assert index.problems == ["sparse member a.bmp is not read: pack it without --sparse"]
    assert (len(index.usable), index.dropped()) == (1, {"no_image": 1})


@pytest.mark.parametrize("junk", ["._0.jpg", "./._0.txt", "__MACOSX/._0.jpg", ".DS_Store", "d/.DS_Store", "Thumbs.db"])
def test_what_systems_leave_behind_is_ignored_and_counted(tmp_path: Path, junk: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in ((junk, b"\0\5\26\7"), ("./0.jpg", encoded()), ("./0.txt", b"words")):
            _add(tar, name, data)
    index, _ = load_or_make(make_shard("tar", str(tmp_path / "a.tar")))
    assert len(index) == len(index.usable) == 1
    assert index.problems == [f"ignored: 1 files left behind by an operating system, such as {junk.removeprefix('./')}"]
