"""Small batches and models for the tests of mono_jax."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from data_pipelines.batch import Batch, BatchSpec
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model

SPEC = BatchSpec(visual_tokens=16, text_tokens=16, token_pixels=8)


def random_batch(rows: int, spec: BatchSpec = SPEC, seed: int = 0, vocab: int = 99) -> Batch:
    """Rows with two samples each: an image then text, and text followed by a little padding."""
    rng = np.random.default_rng(seed)
    batch = spec.empty(rows)
    v, t, s = spec.visual_tokens, spec.text_tokens, spec.sequence
    batch["patches"][:] = rng.integers(0, 256, batch["patches"].shape)
    batch["patch_cells"][:] = np.arange(v) % 16
    batch["tokens"][:] = rng.integers(1, vocab, (rows, t))
    batch["targets"][:, :-1] = batch["tokens"][:, 1:]
    batch["loss_weights"][:] = rng.random((rows, t)) < 0.7
    first = v + t // 2  # tokens of the first sample: one text token, the image, then text
    batch["order"][:] = np.concatenate([[v], np.arange(v), np.arange(v + 1, s)])
    length = s - 2
    batch["segments"][:, :first], batch["segments"][:, first:length] = 1, 2
    batch["positions"][:, :first] = np.arange(first)
    batch["positions"][:, first:length] = np.arange(length - first)
    batch["loss_weights"][:, t - 2 :] = 0
    batch["loss_weights"][:, t // 2 - 1] = 0  # the next token belongs to another sample
    return batch


def random_params(config: Architecture, seed: int = 0, size: float = 0.25) -> dict[str, Any]:
    """All parameters random, norm scales around 1, so that no error is hidden by the zeros and ones of a new model."""
    rng = np.random.default_rng(seed)

    def value(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.float32((path[-1].key == "scale") + rng.normal(size=leaf.shape) * size)

    return jax.tree_util.tree_map_with_path(value, Model(config).abstract_params())


def with_nan(batch: Batch) -> Batch:
    """The batch with loss weights that are not finite."""
    return batch | {"loss_weights": np.full_like(batch["loss_weights"], np.nan)}


def stage_for(config: Architecture, number: str) -> str:
    """The stage's EViP++ name for a model with visual attention experts."""
    return number + ("++" if config.visual_attention_experts else "")
