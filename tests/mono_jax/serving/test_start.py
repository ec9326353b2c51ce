"""The command's flags, and what it says where it cannot start."""

from __future__ import annotations

import pytest

from mono_jax import cli
from mono_jax.errors import ConfigError
from mono_jax.serving import start
from mono_jax.serving.contract import EngineConfig


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ConfigError, match=r"^serving needs uvicorn: pip install '\.\[serve\]'$"):
        start.check_packages()


def test_configs_become_flags_and_back():
    parser = cli.parser("", "")
    cli.add_config_flags(parser, EngineConfig)
    assert cli.config_of(parser.parse_args([]), EngineConfig) == EngineConfig()
    flags = ["--max_rows=3", "--dtype=float32", "--no-reuse_prefixes", "--programs=x"]
    changed = EngineConfig(max_rows=3, dtype="float32", reuse_prefixes=False, programs="x")
    assert cli.config_of(parser.parse_args(flags), EngineConfig) == changed
    with pytest.raises(ConfigError, match=r"engine\.max_rows is 0"):
        cli.config_of(parser.parse_args(["--max_rows=0"]), EngineConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype=int8"])
