"""Keys and values of earlier slots, for decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mono_jax.models.slots import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of all layers; new slots are appended, in any order.

    Attributes:
      keys, values: [L, B, C, Hkv, D].
      positions, segments: int32 [B, C] of the cached slots; segment 0 = empty.
      used: int32 scalar, slots written so far (the same for all rows; padding slots count).
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array
    used: jax.Array

    def append(self, slots: Slots) -> Cache:
        """The cache with positions and segments of S new slots; ``write`` then adds each layer's keys and values."""
        positions, segments = (
            jax.lax.dynamic_update_slice_in_dim(old, new, self.used, axis=1)
            for old, new in ((self.positions, slots.positions), (self.segments, slots.segments))
        )
        used = self.used + slots.positions.shape[1]
        return dataclasses.replace(self, positions=positions, segments=segments, used=used)

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> Cache:
        """The cache with key and value [B, S, Hkv, D] of ``layer`` in the S slots appended last.

        The arrays of all layers are the carry of the scan and are written in place; as its inputs and outputs they
        would be copied whole for every decoded token.
        """
        start = (layer, 0, self.used - key.shape[1], 0, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
            for old, new in ((self.keys, key), (self.values, value))
        )
        return dataclasses.replace(self, keys=keys, values=values)

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, C, Hkv, D] of ``layer``."""
        return tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (self.keys, self.values))

    def widened(self, capacity: int) -> Cache:
        """The cache with empty slots at the end, up to ``capacity``."""
        extra = capacity - self.keys.shape[2]
        keys, values = (jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))) for a in (self.keys, self.values))
        positions, segments = (jnp.pad(a, ((0, 0), (0, extra))) for a in (self.positions, self.segments))
        return Cache(keys, values, positions, segments, self.used)

    def compacted(self, capacity: int) -> Cache:
        """The cache with used slots moved to the front and ``capacity`` slots in all; it must hold the longest row."""
        is_used = self.segments > 0
        front = jnp.argsort(~is_used, axis=1, stable=True)[:, :capacity]
        positions, segments = (jnp.take_along_axis(a, front, axis=1) for a in (self.positions, self.segments))
        keys, values = (jnp.take_along_axis(a, front[None, :, :, None, None], axis=2) for a in (self.keys, self.values))
        used = jnp.max(jnp.sum(is_used, axis=1, dtype=jnp.int32))
        return Cache(keys, values, positions, segments, used).widened(capacity)
