"""Every family computes what transformers computed for a tiny random model of it (tests/reference/make_families.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mono_jax.weights.families.table import FAMILIES
from tests.mono_jax.weights.families.compare import assert_equal

NAMES = [name for name in FAMILIES if name != "internlm2"]  # which has golden cases of its own


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_transformers_does(golden_dir: Path, name: str):
    folder = golden_dir / "families" / name
    assert_equal(folder, dict(np.load(folder / "expected.npz")))
