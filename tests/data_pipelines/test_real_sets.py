"""The command that builds the real sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import real_sets
from data_pipelines.errors import DataError


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"^unknown set 'tuxpant'; did you mean 'tuxpaint'\?$"):
        real_sets.main([f"--out={tmp_path}", "--sets=tuxpant"])
    real_sets.main([f"--out={tmp_path}", "--sets=ocr", "--limit=5", "--vocabulary=320", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sets"]["ocr"]["counts"] == {"pairs": 5}
