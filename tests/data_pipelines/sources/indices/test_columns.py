"""Columns in memory and in files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.sources.indices.columns import ColumnFiles, Columns, GrowingColumns, Strings, ranges


def test_strings() -> None:
    strings = Strings.of([b"a", b"", "é語".encode(), b"\xff"])
    assert [strings[i] for i in range(4)] == ["a", "", "é語", "\udcff"]
    taken = strings.take(np.array([2, 0, 2, 1]))
    assert [taken[i] for i in range(len(taken))] == ["é語", "a", "é語", ""]
    assert len(Strings.of([])) == len(Strings.of([]).take(np.zeros(0, np.int64))) == 0


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_columns_that_grow(tmp_path: Path, limit: int) -> None:
    def make_folder() -> Path:
        (tmp_path / "new").mkdir()
        return tmp_path / "new"

    growing = GrowingColumns(limit, make_folder)
    for i in range(4):
        growing.extend({"a": np.full(i, i, np.int32), "b": np.full((1, 2), i, np.uint8), "empty": np.zeros(0)}, i)
    columns = growing.finish({"x": 1}, unused={"empty"} if limit == 5 else ())
    assert (columns is None) == (tmp_path / "new").exists() == (limit < 6)
    if columns is None:
        columns, header = Columns.load(tmp_path / "new")
        assert header == {"x": 1}
        assert isinstance(columns["a"], np.memmap)
        assert len(pickle.dumps(columns)) < 1000
    for each in (columns, pickle.loads(pickle.dumps(columns))):
        assert each["a"].tolist() == [1, 2, 2, 3, 3, 3] and each["a"].dtype == np.int32
        assert each["b"].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
        assert ("empty" in each) == (limit != 5)


def test_folders_that_are_not_complete(tmp_path: Path) -> None:
    ColumnFiles(tmp_path).append("a", np.arange(3))
    with pytest.raises(OSError):
        Columns.load(tmp_path)
