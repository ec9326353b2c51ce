"""What all commands share."""

from __future__ import annotations

import pytest

from data_pipelines import cli


@pytest.mark.parametrize(
    ("written", "out"),
    [
        (["--out=~/a b"], "/home/of/me/a b"),
        (["--out", "/home/of/me/a b"], "/home/of/me/a b"),
        (["--out=~"], "~"),
        (["--out=a=~/b"], "a=~/b"),
        (["--out=a", "~/b"], "a"),
    ],
)
def test_a_flag_may_name_a_file_at_home(written: list[str], out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells expand ``~`` only where a word begins with it."""
    monkeypatch.setenv("HOME", "/home/of/me")
    monkeypatch.setattr("sys.argv", ["command", *written])
    parser = cli.make_parser("")
    parser.add_argument("--out")
    parser.add_argument("files", nargs="*")
    assert parser.parse_args().out == parser.parse_args(written).out == parser.parse_known_args(written)[0].out == out
