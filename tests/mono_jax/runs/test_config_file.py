from __future__ import annotations

from pathlib import Path

import pytest

from mono_jax import cli
from mono_jax.errors import ConfigError
from mono_jax.runs import config_file

TEXT = """
from ml_collections import ConfigDict
def get_config(arg="a"):
    return ConfigDict({"steps": 1, "rate": 0.5, "name": arg, "data": {"rows": 2, "none": None}})
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(TEXT)
    return path


def parse(*argv: str) -> dict:
    return config_file.parse(cli.parser("test"), argv)[1].to_dict()


def test_overrides_reach_every_key(file: Path):
    values = parse(
        f"--config={file}:b", "--config.steps=7", "--config.data.none=3", "--config.data.new.key=[1,2]",
        "--config.rate=1", "--config.flag=true",
    )  # fmt: skip
    assert values == {
        "steps": 7,
        "rate": 1,
        "name": "b",
        "flag": True,
        "data": {"rows": 2, "none": 3, "new": {"key": [1, 2]}},
    }
    assert parse(f"--config={file}", "--config.name=12")["name"] == "12"  # a string stays one
    assert parse(f"--config={file}", "--config.data.rows=none")["data"]["rows"] is None


def test_errors_name_file_and_key(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match=r"absent\.py"):
        config_file.load(str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="rows holds a value"):
        parse(f"--config={file}", "--config.data.rows.x=1")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 3")
    with pytest.raises(ConfigError, match="ConfigDict"):
        config_file.load(str(broken))
    broken.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        config_file.load(str(broken))
    for wrong in ("--confg.steps=3", "--config.steps", "extra"):
        with pytest.raises(SystemExit):
            parse(f"--config={file}", wrong)
        assert "unrecognized argument" in capsys.readouterr().err
