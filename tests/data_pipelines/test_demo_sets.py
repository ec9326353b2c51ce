"""The command that builds the demo sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines import demo_sets
from data_pipelines.errors import DataError


def test_sizes_that_are_too_small_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^demo set size s2=3: at least 20$"):
        demo_sets.main([f"--out={tmp_path}", "--s2=3"])
