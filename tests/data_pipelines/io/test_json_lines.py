"""The lines of JSONL files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.io import json_lines
from data_pipelines.io.blobs import scan_view


@pytest.mark.parametrize("window", [1, 3, 1 << 22])
@pytest.mark.parametrize("end", ["", "\n", "\n \n\n"])
def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, end: str) -> None:
    monkeypatch.setattr(json_lines, "_WINDOW", window)
    (tmp_path / "a").write_text("\n{}\n  \n[1, 2]\r\n5" + end)
    with scan_view(str(tmp_path / "a")) as view:
        found = [(number, view.read(offset, length)) for number, offset, length in json_lines.lines(view)]
    assert found == [(2, b"{}"), (4, b"[1, 2]\r"), (5, b"5")]
