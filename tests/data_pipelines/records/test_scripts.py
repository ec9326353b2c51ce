"""Writing systems of texts."""

from __future__ import annotations

import pytest

from data_pipelines.records.scripts import SCRIPTS, script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Plain words, 100%", "latin"),
        ("42 + 1", "none"),
        ("Ένα", "greek"),
        ("слово word слово", "cyrillic"),
        ("汉字和一点点 ascii", "han"),
        ("日本の写真", "kana"),
        ("한국어", "hangul"),
        ("مرحبا", "arabic"),
        ("नमस्ते", "devanagari"),
        ("สวัสดี", "thai"),
        ("naïve café", "latin"),
        ("😀😀", "none"),
        ("", "none"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert SCRIPTS[script_of(text)] == script
