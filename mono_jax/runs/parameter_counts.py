"""Counts of what a stage trained and what it left frozen, for its summary."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from mono_jax import tree
from mono_jax.models.adapters import is_adapter
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.runs.config import RunConfig
from mono_jax.training.groups import groups_of, trained_groups


def parameter_counts(run: RunConfig, config: Architecture, params: tree.Tree) -> dict[str, Any]:
    """What trained and what stayed frozen, from shapes and dtypes: parameters by group, and bytes of optimizer
    state."""
    with_adapters = tree.flatten(Model(config, adapters=run.adapters(config)).abstract_params())
    adapters = {path: leaf for path, leaf in with_adapters.items() if is_adapter(path)}
    params = tree.merge(params, tree.unflatten(adapters))  # a model written by a run has none
    groups = groups_of(config, params)
    trained = trained_groups(run.resolved_stage(), config)
    sizes: dict[str, int] = {}
    frozen_bytes = 0
    for path, leaf in tree.flatten(params).items():
        size, group = math.prod(leaf.shape), groups[path]
        sizes[group] = sizes.get(group, 0) + size
        if group not in trained:
            frozen_bytes += size * jnp.dtype(leaf.dtype if run.frozen_dtype == "source" else run.frozen_dtype).itemsize
    trainable = sum(size for group, size in sizes.items() if group in trained)
    return {
        "groups": {group: {"parameters": size, "trained": group in trained} for group, size in sorted(sizes.items())},
        "trainable": trainable,
        "frozen": sum(sizes.values()) - trainable,
        "optimizer_bytes": 8 * trainable,  # AdamW: two float32 moments
        "master_bytes": 4 * trainable,
        "frozen_bytes": frozen_bytes,
    }
