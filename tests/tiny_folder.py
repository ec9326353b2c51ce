"""A Hugging Face folder of a model that answers at random, for tests of commands."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.writers import save_hf


def tiny_config(tokenizer: Tokenizer) -> Architecture:
    """32-pixel tiles of 16 tokens."""
    return preset(
        "tiny_mono",
        vocab_size=tokenizer.vocab_size,
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        vision=VisionConfig(hidden_size=32, patch_size=4, image_size=32),
    )


def tiny_folder(golden_dir: Path, path: Path) -> Path:
    """``path``: a model of ``tiny_config``, with images in at most 2 tiles and the tokenizer of the golden cases."""
    config = tiny_config(Tokenizer(golden_dir / "chat"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) * 0.25), Model(config).abstract_params())
    save_hf(path, config, params)
    values = json.loads((path / "config.json").read_text())
    values |= {"min_dynamic_patch": 1, "max_dynamic_patch": 2, "template": "internlm2-chat"}
    (path / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.model", "added_tokens.json"):
        (path / name).write_bytes((golden_dir / "chat" / name).read_bytes())
    return path
