"""Multimodal mixture of experts with static routing (Mono-InternVL, eq. 4-5).

Slots are modality-major: of x [B, S, d] each row's first slots are visual. Where the boundary is the same
for all rows and known when the program is compiled, each expert is a dense layer on its own slots. An
*elastic* boundary differs from row to row and is an array; the grouped kernels of ``pallas_kernels`` take a
map from tiles of slots to experts, so that no slot is computed twice there either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import ModelConfig
from mono_jax.models.layers import Linear, SwiGLU
from mono_jax.parallel.sharding import BATCH, ROWS, per_device, tensor_axis
from pallas_kernels.experts import api
from pallas_kernels.experts.contract import FfnWeights


class Boundary(NamedTuple):
    """Where a row's visual slots end: ``static`` for all rows, or ``elastic`` int32 [B], one for each."""

    static: int
    elastic: jax.Array | None = None

    def is_visual(self, slots: int) -> jax.Array:
        """bool [1 or B, slots, 1]."""
        end = jnp.array([self.static]) if self.elastic is None else self.elastic
        return (jnp.arange(slots)[None] < end[:, None])[..., None]


def by_modality(
    text: Linear | SwiGLU, visual: Linear | SwiGLU | None, x: jax.Array, boundary: Boundary, config: ModelConfig
) -> jax.Array:
    """Applies ``visual`` to the visual slots of x [B, S, d] and ``text`` to the rest.

    Without a visual expert every slot takes ``text``. ``config.mmoe`` chooses the form: "static", "grouped", or
    "dense_both", which runs both experts on all slots and chooses by mask (the naive form of the papers; the
    oracle of the tests). Raises ConfigError for "static" with an elastic boundary.
    """
    if visual is None or (boundary.elastic is None and boundary.static == 0):
        return text(x)
    if config.mmoe == "dense_both":
        return jnp.where(boundary.is_visual(x.shape[1]), visual(x), text(x))
    if config.mmoe == "grouped":
        return _grouped(text, visual, x, boundary, config)
    if boundary.elastic is not None:
        raise ConfigError("model.mmoe 'static' cannot serve rows with boundaries of their own: use 'grouped'")
    if boundary.static == x.shape[1]:
        return visual(x)
    return jnp.concatenate([visual(x[:, : boundary.static]), text(x[:, boundary.static :])], axis=1)


def _grouped(text: Any, visual: Any, x: jax.Array, boundary: Boundary, config: ModelConfig) -> jax.Array:
    """The rows of all x in one grouped call a device; tiles do not straddle a boundary, so nothing is permuted."""
    rows, slots, width = x.shape
    tile = config.mmoe_tile
    if slots % tile or (boundary.elastic is None and boundary.static % tile):
        raise ConfigError(
            f"model.mmoe 'grouped' needs rows of whole tiles: {slots} slots, {boundary.static} of them visual, "
            f"model.mmoe_tile {tile}: change data.visual and data.text, or model.mmoe_tile"
        )
    # The first slot of a tile decides for all of it; TEXT and VISUAL are 0 and 1.
    experts = jnp.broadcast_to(boundary.is_visual(slots)[:, ::tile, 0], (rows, slots // tile)).astype(jnp.int32)
    options = {"block": tile, "implementation": None if config.mmoe_kernel == "auto" else config.mmoe_kernel}

    def ffn(x: jax.Array, experts: jax.Array, *weights: Any) -> jax.Array:
        y = api.modality_ffn(x.reshape(-1, width), experts.reshape(-1), *weights, **options)
        return y.reshape(1, *x.shape[:2], -1)

    def matmul(x: jax.Array, experts: jax.Array, *kernels: jax.Array) -> jax.Array:
        y = api.modality_matmul(x.reshape(-1, width), experts.reshape(-1), *kernels, **options)
        return y.reshape(*x.shape[:2], -1)

    if isinstance(text, SwiGLU):
        weights = _ffn_weights(text), _ffn_weights(visual)
        split = tensor_axis(config.intermediate_size)
        specs = FfnWeights(P(None, split), P(None, split), P(split, None))
        # Each device has a part of the sum over the FFN's columns; added outside, its transpose is a broadcast.
        y = per_device(ffn, (BATCH, BATCH, specs, specs), P(split, ROWS))(x, experts, *weights).sum(axis=0)
    else:
        kernels = text.kernel[...], visual.kernel[...]
        split = tensor_axis(kernels[0].shape[1])
        specs = P(None, split)
        y = per_device(matmul, (BATCH, BATCH, specs, specs), P(ROWS, None, split))(x, experts, *kernels)
    if hasattr(text, "bias"):
        y += jnp.where(boundary.is_visual(slots), visual.bias[...], text.bias[...]).astype(y.dtype)
    return y


def _ffn_weights(expert: SwiGLU) -> FfnWeights:
    return FfnWeights(*(part.kernel[...] for part in (expert.gate, expert.up, expert.down)))
