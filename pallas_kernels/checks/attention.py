"""The float64 oracle of packed attention and a case that every form has to pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.contract import SequenceOrder, Slots

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def oracle_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, query_slots: Slots, key_slots: Slots, dy: np.ndarray
) -> tuple[np.ndarray, Arrays]:
    """(output, (dquery, dkey, dvalue)), sample by sample, in float64 numpy; zeros in empty slots.

    Each sample is taken out of its row and attended to by itself, causally by position.

    Args:
      query: [B, Q, Hq, D].
      key: [B, K, Hkv, D].
      value: [B, K, Hkv, D].
      query_slots: positions and segments [B, Q].
      key_slots: positions and segments [B, K].
      dy: [B, Q, Hq, D], cotangent of the output.
    """
    query, key, value, dy = (np.float64(a) for a in (query, key, value, dy))
    y, dq, dk, dv = np.zeros_like(query), np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    group, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
    for row in range(len(query)):
        for segment in set(np.asarray(query_slots.segments[row]).tolist()) - {0}:
            q_at = np.flatnonzero(query_slots.segments[row] == segment)
            k_at = np.flatnonzero(key_slots.segments[row] == segment)
            seen = np.asarray(query_slots.positions[row])[q_at, None] >= np.asarray(key_slots.positions[row])[k_at]
            for head in range(query.shape[2]):
                q, k, v = query[row, q_at, head], key[row, k_at, head // group], value[row, k_at, head // group]
                scores = np.where(seen, q @ k.T * scale, -np.inf)
                exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
                p = exponentials / exponentials.sum(axis=1, keepdims=True)
                out, dout = p @ v, dy[row, q_at, head]
                y[row, q_at, head] = out
                dscores = p * (dout @ v.T - np.sum(dout * out, axis=1, keepdims=True)) * scale
                dq[row, q_at, head] = dscores @ k
                dk[row, k_at, head // group] += dscores.T @ q
                dv[row, k_at, head // group] += p.T @ dout
    return y, (dq, dk, dv)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Packed rows whose samples and empty slots lie scattered over the slots, made from a seed.

    Attributes:
      empty: empty slots of each row.
      length: S.
      samples: samples of a row that is not empty.
      heads: Hq.
      kv_heads: Hkv.
      dim: D.
      dtype: of query, key and value.
    """

    empty: tuple[int, ...] = (17, 0)
    length: int = 128
    samples: int = 3
    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    dtype: str = "float32"

    def inputs(self) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Slots, SequenceOrder, jax.Array]:
        """(query, key, value), slots, sequence order, cotangent (zero in empty slots)."""
        rng = np.random.default_rng(0)
        shape = (len(self.empty), self.length)
        qkv = tuple(self._normal(rng, *shape, heads, self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        positions, segments, order = (np.zeros(shape, np.int32) for _ in range(3))
        for row, empty in enumerate(self.empty):
            order[row] = rng.permutation(self.length)
            for number, places in enumerate(self._samples(rng, self.length - empty)):
                at = order[row, places]
                positions[row, at], segments[row, at] = places - places[0], number + 1
        dy = self._normal(rng, *shape, self.heads, self.dim) * (segments > 0)[..., None, None]
        slots = Slots(jnp.asarray(positions), jnp.asarray(segments))
        return qkv, slots, SequenceOrder(*(jnp.asarray(a) for a in (order, np.argsort(order, axis=1)))), dy

    def _normal(self, rng: np.random.Generator, *shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), self.dtype)

    def _samples(self, rng: np.random.Generator, filled: int) -> list[np.ndarray]:
        """Places of each sample in the row."""
        if not filled:
            return []
        starts = np.sort(rng.choice(np.arange(1, filled), self.samples - 1, replace=False))
        return np.split(np.arange(filled), starts)
