"""Plain text."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.sources.source import open_source


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_text_is_cut_without_loss(tmp_path: Path, separator: str) -> None:
    text = separator.join(f"word{i}é語😀" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    source = open_source({"kind": "text", "paths": str(tmp_path / "a.txt"), "chunk_bytes": 100})
    pieces = [source.read(i).text for i in range(len(source))]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 100
    assert source.read(0).key == "a.txt:1"
    if separator:
        assert all(piece.endswith(separator) for piece in pieces[:-1])
