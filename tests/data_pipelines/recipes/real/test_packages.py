"""Fetching packages: through clients that stand in for the real ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.recipes.real.packages import Package, PackageStore

NPM = Package("npm", ("@scope/pictures",), "1.1.0")
DEBIAN = Package("debian", ("pictures-2", "pictures-1"))


def _client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_npm_package_is_fetched_once(tmp_path: Path, clients: Path) -> None:
    source = tmp_path / "package"
    source.mkdir()
    (source / "package.json").write_text(json.dumps({"license": "MIT"}))
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        tar.add(source, "package")
    _client(clients, "npm", f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/made.tgz scope-pictures.tgz')
    for _ in range(2):  # the second store finds what the first left
        store = PackageStore(tmp_path / "store")
        assert (store.unpacked(NPM) / "package/package.json").is_file()
        assert store.licence(NPM) == "MIT"
    assert (tmp_path / "calls").read_text() == "pack --silent @scope/pictures@1.1.0\n"
    assert not list((tmp_path / "store").rglob("*.tgz"))


@pytest.mark.parametrize("filters", [False] + [True] * hasattr(tarfile, "data_filter"))
def test_nothing_leaves_the_folder_with_filters_or_without(
    filters: bool, tmp_path: Path, clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.3 and older, such as Debian 12's, have no filters for archives."""
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        for name in ("package/package.json", "../../../outside", f"{tmp_path}/outside"):
            (member := tarfile.TarInfo(name)).size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    _client(clients, "npm", f"cp {tmp_path}/made.tgz scope-pictures.tgz")
    store = PackageStore(tmp_path / "store")
    with contextlib.suppress(DataError):  # filters refuse, where there are some
        assert (store.unpacked(NPM) / "package/package.json").is_file()
    assert not (tmp_path / "outside").exists()


def test_debian_package_takes_the_first_name_there_is_and_needs_no_root(tmp_path: Path, clients: Path) -> None:
    calls = tmp_path / "calls"
    script = f'echo "$@" >> {calls}; case "$*" in *pictures-2) echo "E: Unable to locate package" >&2; exit 100;; '
    _client(clients, "apt-get", script + "*download*) touch pictures.deb;; esac")
    doc = "usr/share/doc/pictures-1"
    licence = "License: GPL-2+\\n text\\nLicense: CC-BY-SA-4.0\\nLicense: GPL-2+\\n"
    _client(clients, "dpkg-deb", f"mkdir -p {doc}; printf '{licence}' > {doc}/copyright")
    store = PackageStore(tmp_path / "store")
    folder = store.unpacked(DEBIAN)
    assert (folder / doc).is_dir() and not list(folder.glob("*.deb"))
    assert store.licence(DEBIAN) == "GPL-2+, CC-BY-SA-4.0"
    lines = calls.read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["update", "pictures-2", "pictures-1"]
    assert all(f"-oDir::State::lists={tmp_path}/store/apt/lists" in line for line in lines)


def test_a_missing_client_and_a_failing_one_are_named(
    tmp_path: Path, clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _client(clients, "npm", "echo 'npm error code E404' >&2; echo 'more' >&2; exit 1")
    store = PackageStore(tmp_path / "store")
    with pytest.raises(DataError, match=r"npm package @scope/pictures: .*npm error code E404$"):
        store.unpacked(NPM)
    monkeypatch.setenv("PATH", str(clients))
    with pytest.raises(DataError, match="apt-get is not on this system"):
        store.unpacked(DEBIAN)
    assert not list((tmp_path / "store/npm").iterdir()) and not list((tmp_path / "store/debian").iterdir())


def test_a_damaged_archive_is_not_kept(tmp_path: Path, clients: Path) -> None:
    _client(clients, "npm", "echo rubbish > scope-pictures.tgz")
    store = PackageStore(tmp_path / "store")
    with pytest.raises(DataError, match="damaged"):
        store.unpacked(NPM)
    assert not (tmp_path / "store/npm/@scope__pictures").exists()


def test_licence_of_a_wheel(tmp_path: Path) -> None:
    package = Package("pypi", ("thing",))
    folder = tmp_path / "store/pypi/thing"
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr(
            "thing-1.dist-info/METADATA", "Name: thing\nLicense: UNKNOWN\nClassifier: License :: OSI :: MIT\n"
        )
    with zipfile.ZipFile(tmp_path / "x.whl") as wheel:
        wheel.extractall(folder)
    assert PackageStore(tmp_path / "store").licence(package) == "MIT"
