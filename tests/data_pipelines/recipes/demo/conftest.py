"""Demo sets that these tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.recipes.demo.sets import build_demo_sets
from data_pipelines.recipes.manifest import load_manifest
from tests.data_pipelines.recipes.demo.demo_tools import SIZES


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    build_demo_sets(root, sizes=SIZES)
    return root


@pytest.fixture(scope="session")
def demo_manifest(demo_dir: Path) -> dict[str, Any]:
    return load_manifest(demo_dir)
