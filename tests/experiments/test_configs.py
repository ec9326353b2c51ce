"""Every shipped config, with each argument that its docstrings name, is one that a command takes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mono_jax.runs import config_file
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.program import architecture_of

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"


def shipped() -> list[str]:
    """FILE and FILE:ARG of every config."""
    found = []
    for file in sorted(CONFIGS.glob("*.py")):
        if file.name != "__init__.py":
            arguments = re.findall(
                rf"{re.escape(file.name)}(:[\w.+-]*\w\+*)", ast.get_docstring(ast.parse(file.read_text()))
            )
            found += [f"{file.name}{argument}" for argument in ("", *dict.fromkeys(arguments))]
    return found


def test_there_are_some():
    assert {"demo.py", "demo.py:smoke", "real.py:2b"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_build(name: str):
    config = config_file.load(str(CONFIGS / name))
    if "stages" in config:
        EvipConfig.from_dict(config)
    else:
        run = RunConfig.from_dict(config)
        assert run.init or architecture_of(run)
