"""Damage that is no single sample's: it is told when a source is opened, and costs no more than it must."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from shard_tools import pairs, write_tar

from data_pipelines import indexed, sources
from data_pipelines.sources import open_source


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("rows", [1 << 20, 1])
def test_damaged_shards_are_told_on_opening(tmp_path: Path, monkeypatch, caplog, rows: int) -> None:
    monkeypatch.setattr(indexed, "TABLE_ROWS", rows)
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(2))
    os.truncate(tmp_path / "b.tar", 2000)
    (tmp_path / "c.tar").write_bytes(b"garbage" * 1000)
    for _ in range(2):  # made, then found
        caplog.clear()
        source = open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
        found = source.problems()
        assert list(found) == [str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert told == [f"{path}: {problem}" for path, each in found.items() for problem in each]
    monkeypatch.setattr(sources, "_PROBLEMS_LOGGED", 1)
    caplog.clear()
    open_source({"kind": "tar", "paths": str(tmp_path / "*.tar")})
    assert len(caplog.records) == 2 and "problems more" in caplog.records[1].getMessage()
