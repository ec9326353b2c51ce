from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from data_pipelines.io import publish


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "folder" / "file"
    with publish.new_file(target) as file:
        file.write_text("first")
        assert not target.exists()
        assert publish.is_temporary(file.name) and not publish.is_temporary(target.name)
        assert file.parent == target.parent
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError), publish.new_file(target) as file:
        file.write_text("second")
        raise RuntimeError
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), publish.new_folder(target) as folder:
        (folder / "file").write_text("")
        raise RuntimeError
    assert os.listdir(target.parent) == []
    target.mkdir()  # an empty folder is no obstacle
    with publish.new_folder(target) as folder:
        assert publish.is_temporary(folder.name)
        (folder / "file").write_text("first")
        assert os.listdir(target) == []
    assert (target / "file").read_text() == "first"
    assert os.listdir(target.parent) == ["b"]


def test_a_folder_is_replaced_only_on_demand(tmp_path: Path):
    target = tmp_path / "a"
    for text in ("first", "second"):
        with publish.new_folder(target, replace=True) as folder:
            (folder / text).write_text("")
        assert os.listdir(target) == [text]
    with pytest.raises(FileExistsError), publish.new_folder(target):
        raise AssertionError("not reached")
    with pytest.raises(FileExistsError), publish.new_folder(target / "second"):
        raise AssertionError("not reached")
    assert os.listdir(tmp_path) == ["a"]


def test_the_quicker_of_two_processes_wins(tmp_path: Path):
    target = tmp_path / "a"
    with pytest.raises(FileExistsError), publish.new_folder(target) as slow:
        (slow / "slow").write_text("")
        with publish.new_folder(target) as quick:
            (quick / "quick").write_text("")
    assert os.listdir(target) == ["quick"]
    assert os.listdir(tmp_path) == ["a"]


def test_bytes_text_and_json(tmp_path: Path):
    publish.write_bytes(tmp_path / "x" / "bytes", b"\0\1")
    assert (tmp_path / "x" / "bytes").read_bytes() == b"\0\1"
    publish.write_text(tmp_path / "text", "ä\n")
    assert (tmp_path / "text").read_bytes() == "ä\n".encode()
    publish.write_json(tmp_path / "json", {"a": ["ä"]})
    text = (tmp_path / "json").read_text("utf-8")
    assert json.loads(text) == {"a": ["ä"]}
    assert text == '{\n  "a": [\n    "ä"\n  ]\n}\n'


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path):
    def leave(name: str) -> Path:
        generator = publish.new_file(tmp_path / name)
        return type(generator).__enter__(generator)

    names = [leave("old"), leave("new"), leave("old_folder")]
    for path in names[:2]:
        path.write_text("")
    names[2].mkdir()
    (names[2] / "file").write_text("")
    (tmp_path / "notes.tmp").write_text("a user's own")
    long_ago = time.time() - 2 * 86_400
    for path in (names[0], names[2] / "file", names[2], tmp_path / "notes.tmp"):
        os.utime(path, (long_ago, long_ago))
    publish.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[1].name, "notes.tmp"}
    publish.remove_stale(tmp_path / "not_there")
