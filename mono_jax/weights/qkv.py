"""Query, key and value projections: three tensors in a checkpoint, one fused tensor here."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from mono_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Heads:
    """Rows of the fused tensor: per KV head its group of queries, its key and its value, each of ``dim`` rows."""

    groups: int
    kv_heads: int
    dim: int

    @classmethod
    def of(cls, config: Architecture) -> Self:
        kv_heads = config.num_key_value_heads
        return cls(config.num_attention_heads // kv_heads, kv_heads, config.head_dim)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        return self.groups * self.kv_heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim

    def fuse(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """q [Hq * D, ...], k and v [Hkv * D, ...] as one [(Hq + 2 * Hkv) * D, ...]."""
        parts = [part.reshape(self.kv_heads, -1, *part.shape[1:]) for part in (query, key, value)]
        fused = np.concatenate(parts, axis=1)
        return fused.reshape(-1, *fused.shape[2:])

    def split(self, fused: np.ndarray) -> tuple[np.ndarray, ...]:
        """The inverse of ``fuse``."""
        rows = fused.reshape(self.kv_heads, -1, *fused.shape[1:])
        parts = np.split(rows, [self.groups * self.dim, (self.groups + 1) * self.dim], axis=1)
        return tuple(part.reshape(-1, *part.shape[2:]) for part in parts)
