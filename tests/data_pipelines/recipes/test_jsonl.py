"""JSONL files: written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.recipes.jsonl import read_jsonl, write_jsonl


def test_an_interrupted_jsonl_file_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, [{"a": "é\n"}, {"a": 2}]) == 2
    assert list(read_jsonl(path)) == [{"a": "é\n"}, {"a": 2}]
    with pytest.raises(ZeroDivisionError):
        write_jsonl(tmp_path / "b.jsonl", ({"a": 1 / i} for i in (1, 0)))
    assert not (tmp_path / "b.jsonl").exists()
