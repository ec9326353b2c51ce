"""Output: the first process prints on the console, and each of several processes writes its own file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mono_jax.runs.console import say_in
from tests.mono_jax.peers import Peers


def test_a_single_process_prints_and_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    say_in(tmp_path)("line")
    assert capsys.readouterr().out == "line\n" and not list(tmp_path.iterdir())


def test_of_several_the_first_prints_and_each_keeps_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    peers = Peers(3, monkeypatch)
    assert peers.run(lambda index: say_in(tmp_path)(f"line of {index}")) == [None] * 3
    assert capsys.readouterr().out == "line of 0\n"
    for index in range(3):
        log = (tmp_path / "logs" / f"process-{index}.log").read_text()
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d line of {index}\n", log)


def test_a_log_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "logs").write_text("a file, no folder")
    assert Peers(2, monkeypatch).run(lambda index: say_in(tmp_path)("line")) == [None] * 2
    assert capsys.readouterr().out == "line\n"
