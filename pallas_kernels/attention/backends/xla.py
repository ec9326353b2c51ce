"""Attention with XLA's own operations: slots in any order, any device, Q and K of any length."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.contract import OUTPUT, Implementation, Intervals, Problem, visible
from pallas_kernels.precision import float32_sums, product_precision


@dataclasses.dataclass(frozen=True)
class Xla(Implementation):
    """All scores [B, Hq, Q, K] at once, recomputed in the backward pass: less memory and, on CPUs, less time."""

    name: ClassVar[str] = "attention/xla"
    any_order: ClassVar[bool] = True

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        output = jax.checkpoint(lambda *args: probabilities_and_output(*args)[1])(query, key, value, intervals)
        return checkpoint_name(output, OUTPUT)


@dataclasses.dataclass(frozen=True)
class XlaChunked(Implementation):
    """The same with the scores of ``chunk`` queries in memory at a time."""

    name: ClassVar[str] = "attention/xla_chunked"
    any_order: ClassVar[bool] = True

    chunk: int = 512

    def unsupported(self, problem: Problem) -> str | None:
        return None

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {"chunk": [256, 512, 1024, 2048]}

    def with_chunk(self, chunk: int) -> Self:
        return dataclasses.replace(self, chunk=chunk)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        b, length = query.shape[:2]
        if length <= self.chunk:
            return Xla()(query, key, value, intervals)
        padding = -length % self.chunk
        bounds = tuple(jnp.pad(a, ((0, 0), (0, padding))) for a in (intervals.first, intervals.last))
        query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))

        @jax.checkpoint
        def block(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q, first, last = args
            return probabilities_and_output(q, key, value, Intervals(first, last, intervals.places))[1]

        parts = (jnp.moveaxis(a.reshape(b, -1, self.chunk, *a.shape[2:]), 1, 0) for a in (query, *bounds))
        output = jnp.moveaxis(jax.lax.map(block, tuple(parts)), 0, 1)
        return checkpoint_name(output.reshape(b, length + padding, *output.shape[3:])[:, :length], OUTPUT)


def probabilities_and_output(
    query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals
) -> tuple[jax.Array, jax.Array]:
    """(probabilities float32 [B, Hq, Q, K], output as in the contract)."""
    b, q_len, heads, dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    # The queries of a group are contiguous: plain batched products, no transposed scores.
    grouped = (query * dim**-0.5).reshape(b, q_len, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(b, kv_heads, group * q_len, dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    precision = product_precision(query, key, value)
    scores = float32_sums("bhqd,bhkd->bhqk", grouped, key)
    scores = scores.reshape(b, kv_heads, group, q_len, -1)
    scores = jnp.where(visible(intervals, key.shape[2])[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    mixed = probabilities.astype(value.dtype).reshape(b, kv_heads, group * q_len, -1)
    output = jnp.einsum("bhqk,bhkd->bhqd", mixed, value, precision=precision)
    output = output.reshape(b, kv_heads, group, q_len, dim).transpose(0, 3, 1, 2, 4)
    return probabilities.reshape(b, heads, q_len, -1), output.reshape(b, q_len, heads, dim)
