"""JSON files and checksums: every error names the file."""

from __future__ import annotations

import json

import pytest

from mono_jax.errors import ConfigError
from mono_jax.files import CHECKSUMS_FILE, Damaged, read_json, reason, verify_checksums, write_checksums


def test_json_objects_are_read_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(ConfigError, match=r"a\.json: no such file"):
        read_json(file)
    for text, message in (
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        ("[1]", "must hold a JSON object, not list"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=rf"a\.json: {message}"):
            read_json(file)
    file.write_text(json.dumps({"a": "ä"}))
    assert read_json(file) == {"a": "ä"}


def test_reasons_are_one_short_line():
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyError()) == "KeyError"
    assert reason(OSError("x No space left on device y")) == "no space left on device"
    assert reason(ValueError("x" * 300)) == "x" * 200 + "..."


def test_checksums_name_the_file_that_changed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert not verify_checksums(tmp_path)
    write_checksums(tmp_path)
    assert verify_checksums(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(Damaged, match="damaged: b is missing"):
        verify_checksums(tmp_path)
    (tmp_path / "b").write_text("b")
    (tmp_path / "sub" / "a").write_text("A")
    with pytest.raises(Damaged, match="damaged: sub/a has changed since it was written"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        b"",
        b"\xff",
        b"[]",
        b"3",
        b"null",
        b"[" * 100_000,
        b'{"sha256": []}',
        b'{"sha256": {}, "processes": "2"}',
        b'{"processes": 1}',
    ],
)
def test_a_list_of_any_content_is_damaged(tmp_path, content: bytes):
    (tmp_path / "b").write_text("b")
    write_checksums(tmp_path)
    (tmp_path / CHECKSUMS_FILE).write_bytes(content)
    with pytest.raises(Damaged, match=rf"damaged: {CHECKSUMS_FILE} is unreadable"):
        verify_checksums(tmp_path)
