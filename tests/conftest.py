"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices: sharding is tested for real; tests that want one device use the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers made by running the public PyTorch release on tiny random weights (facts, not code)."""
    return Path(__file__).parent / "golden"
