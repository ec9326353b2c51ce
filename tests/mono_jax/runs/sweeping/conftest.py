"""A sweep of three stages that can be planned without data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    data = {"sources": [{"spec": {"kind": "text", "paths": "x"}}], "tokenizer": "t"}
    stages = {"s0": {"stage": "S0", "steps": 4, "model": {"preset": "tiny_lm", "vocab_size": 300},
                     "data": {"visual_tokens": 0}},
              "s1_1": {"stage": "S1.1", "steps": 2}, "s2": {"stage": "S2", "steps": 2}}
    return ConfigDict({"data": data, "stages": stages, "vision": {"image_size": 56}})
"""

SWEEP = """
'''Rates of learning.'''
CONFIG = {config!r}
def sweep(add):
    add("low", seeds=2)
    add("high", {{"stages.s2.optim.learning_rate": 1e-2}}, seeds=2)
    add("short", {{"stages": ["s0", "s2"]}})
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def write_sweep(config: Path) -> Callable[[str], Path]:
    """Writes a sweep file with this body of ``sweep(add)``."""

    def write(body: str) -> Path:
        file = config.with_name("sweep.py")
        file.write_text(f"CONFIG = {str(config)!r}\n" + body)
        return file

    return write


@pytest.fixture
def sweep_file(config: Path) -> Path:
    file = config.with_name("rates.py")
    file.write_text(SWEEP.format(config=str(config)))
    return file
