"""Copies of remote files, and whole files written to either side."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from data_pipelines.errors import DataError
from data_pipelines.io import copies


def test_copies_are_made_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/copies/a", b"1")
    first = copies.local_copy("memory://copies/a")
    assert Path(first).read_bytes() == b"1" and copies.local_copy("memory://copies/a") == first
    fs.pipe_file("/copies/a", b"22")
    assert Path(copies.local_copy("memory://copies/a")).read_bytes() == b"22"
    assert {path.read_bytes() for path in Path(copies.local_folder("memory://copies")).glob("a")} == {b"22"}
    fs.rm("/copies", recursive=True)
    assert copies.local_copy(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    with pytest.raises(DataError, match="copies/a"):
        copies.local_copy("memory://copies/a")


def test_files_are_written_to_either_side(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"copied")
    for target in (str(tmp_path / "new" / "a"), "memory://written/a"):
        copies.write_bytes(target, b"bytes")
        fs, inner = fsspec.core.url_to_fs(target)
        assert fs.cat_file(inner) == b"bytes"
        copies.copy_to(str(tmp_path / "source"), target)
        assert fs.cat_file(inner) == b"copied"
    fs.rm("/written", recursive=True)
    with pytest.raises(OSError):
        copies.write_bytes(str(tmp_path / "source" / "a"), b"")
