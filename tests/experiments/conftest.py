"""Tiny sets that the tests of the commands train on, built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines import demo_sets


@pytest.fixture(scope="session")
def sets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small demo sets (64-pixel pictures, 16 visual tokens each)."""
    pytest.importorskip("easy_vqa")
    folder = tmp_path_factory.mktemp("sets")
    sizes = dict.fromkeys(("s1_1", "s1_2", "s1_3", "s2", "heldout_captions", "heldout_questions"), 40)
    demo_sets.build_demo_sets(folder, sizes=demo_sets.DemoSizes(text_bytes=150_000, **sizes))
    return folder


@pytest.fixture(scope="session")
def sets(sets_dir: Path) -> dict[str, Any]:
    """Their manifest."""
    return demo_sets.load_manifest(sets_dir)
