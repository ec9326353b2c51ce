"""Fixtures of the tests of weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mono_jax.weights import readers
from mono_jax.weights.model_folder import open_model


@pytest.fixture
def golden(golden_dir):
    """(config.json, tensors) of the golden model ``name``."""

    def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
        folder = golden_dir / name
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    return load


@pytest.fixture
def model(golden_dir):
    """(config, parameters in memory, the same lazily) of a golden model."""
    config, lazy, _ = open_model(golden_dir / "mono_tiny", image_token_id=100)
    return config, readers.load_params(golden_dir / "mono_tiny", config), lazy
