"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices: sharding is tested for real; tests that want one device use the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers made by running the public PyTorch release on tiny random weights (facts, not code)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def sets_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small demo sets (64-pixel pictures, 16 visual tokens each), built once."""
    pytest.importorskip("easy_vqa")
    from data_pipelines.recipes.demo.sets import build_demo_sets
    from data_pipelines.recipes.demo.sizes import DemoSizes

    folder = tmp_path_factory.mktemp("sets")
    sizes = dict.fromkeys(("s1_1", "s1_2", "s1_3", "s2", "heldout_captions", "heldout_questions"), 40)
    build_demo_sets(folder, sizes=DemoSizes(text_bytes=150_000, **sizes))
    return folder


@pytest.fixture(scope="session")
def sets(sets_dir: Path) -> dict[str, Any]:
    """Their manifest."""
    from data_pipelines.recipes.manifest import load_manifest

    return load_manifest(sets_dir)
