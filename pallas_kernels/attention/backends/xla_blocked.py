"""Packed attention with XLA's own operations, block by block: any device and dtype, memory linear in the length.

A loop over query blocks contains a loop over the key blocks that any of the block's queries sees (``spans``): blocks of
other samples and later ones are neither read nor computed, and only one block of scores exists at a time. The backward
pass recomputes them. This is FlashAttention-2 (arXiv 2307.08691) in plain XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.contract import LSE, OUTPUT, Implementation, Intervals, Problem, needs_order
from pallas_kernels.attention.spans import key_spans
from pallas_kernels.precision import product_precision

_NO_MAXIMUM = -1e30  # below all scores, and finite: a block without visible keys must not produce inf - inf


@dataclasses.dataclass(frozen=True)
class XlaBlocked(Implementation):
    """The loops below as an implementation of the contract.

    Attributes:
      block_q: queries per block.
      block_kv: keys per block.
    """

    name: ClassVar[str] = "attention/xla_blocked"

    block_q: int = 128
    block_kv: int = 128

    def unsupported(self, problem: Problem) -> str | None:
        return needs_order(problem)

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {"block_q": [128, 256, 512, 1024], "block_kv": [128, 256, 512, 1024]}

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        queries = query.shape[1]
        first, last = (_pad(bound, self.block_q, mode="edge") for bound in (intervals.first, intervals.last))
        query = _pad(query, self.block_q)
        key, value = (_pad(a, self.block_kv) for a in (key, value))
        return _attention(self, query, key, value, first, last)[:, :queries]


def _pad(array: jax.Array, multiple: int, **mode: Any) -> jax.Array:
    """Pads axis 1 to a multiple."""
    widths = [(0, 0), (0, -array.shape[1] % multiple)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, widths, **mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    blocks: XlaBlocked, query: jax.Array, key: jax.Array, value: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
    return _forward(blocks, query, key, value, first, last)[0]


def _forward(
    blocks: XlaBlocked, query: jax.Array, key: jax.Array, value: jax.Array, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, Any]:
    """Output, and what the backward pass needs."""
    rows = _Rows(blocks, query, key, first, last)
    k, v = _heads_first(key), _heads_first(value)

    def block(row: jax.Array, q: jax.Array, first: jax.Array, last: jax.Array, run: jax.Array) -> Any:
        def step(j: jax.Array, carried: Any) -> Any:
            output, maximum, total = carried
            s = rows.scores(q, rows.keys(k, row, j), first, last, j)
            new_maximum = jnp.maximum(maximum, s.max(axis=-1))
            p = jnp.exp(s - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            output = output * shrink[..., None] + _product("hqk,hkd->hqd", p, rows.keys(v, row, j))
            return output, new_maximum, total * shrink + p.sum(axis=-1)

        shape = q.shape[:2]
        zeros, lowest = jnp.zeros(q.shape, jnp.float32), jnp.full(shape, _NO_MAXIMUM, jnp.float32)
        output, maximum, total = lax.fori_loop(run[0], run[1], step, (zeros, lowest, jnp.zeros(shape, jnp.float32)))
        return (output / total[..., None]).astype(query.dtype), maximum + jnp.log(total)

    output, lse = lax.map(lambda item: block(*item), rows.items(query))
    # Names for remat policies: if both are saved, the backward pass does not recompute them.
    output, lse = checkpoint_name(output, OUTPUT), checkpoint_name(lse, LSE)
    return rows.together(output), (query, key, value, first, last, output, lse)


def _backward(blocks: XlaBlocked, residuals: Any, d_output: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, first, last, output, lse = residuals
    rows = _Rows(blocks, query, key, first, last)
    k, v = _heads_first(key), _heads_first(value)
    do = rows.apart(d_output)
    delta = jnp.sum(output.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    scale = query.shape[3] ** -0.5

    def block(gradients: tuple[jax.Array, jax.Array], item: Any) -> Any:
        (row, q, first, last, run), do, lse, delta = item

        def step(j: jax.Array, carried: Any) -> Any:
            dq, dk, dv = carried
            k_block, v_block = rows.keys(k, row, j), rows.keys(v, row, j)
            p = jnp.exp(rows.scores(q, k_block, first, last, j) - lse[..., None])
            dp = _product("hqd,hkd->hqk", do, v_block)
            ds = p * (dp - delta[..., None]) * scale
            dk = rows.add(dk, row, j, _product("hqk,hqd->hkd", ds, q))
            dv = rows.add(dv, row, j, _product("hqk,hqd->hkd", p, do))
            return dq + _product("hqk,hkd->hqd", ds, k_block), dk, dv

        dq, *gradients = lax.fori_loop(run[0], run[1], step, (jnp.zeros(q.shape, jnp.float32), *gradients))
        return tuple(gradients), dq.astype(query.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(block, (zeros, zeros), (rows.items(query), do, lse, delta))
    dk, dv = (_heads_first(a).astype(key.dtype) for a in (dk, dv))
    return rows.together(dq), dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation, a.astype(b.dtype), b, precision=product_precision(b), preferred_element_type=jnp.float32
    )


def _heads_first(array: jax.Array) -> jax.Array:
    """[B, K, Hkv, D] <-> [B, Hkv, K, D]."""
    return array.swapaxes(1, 2)


class _Rows:
    """Rows split into query blocks; the queries of a group of heads that share keys are contiguous."""

    def __init__(self, blocks: XlaBlocked, query: jax.Array, key: jax.Array, first: jax.Array, last: jax.Array) -> None:
        self.batch, queries, heads, self.dim = query.shape
        self.kv_heads = key.shape[2]
        self.group = heads // self.kv_heads
        self.block_q, self.block_kv = blocks.block_q, blocks.block_kv
        self.first, self.last = (bound.reshape(-1, self.block_q) for bound in (first, last))
        spans = key_spans(first, last, self.block_q, self.block_kv)
        self.runs = jnp.stack([spans.start, spans.stop], axis=-1).reshape(-1, 2)
        self.row = jnp.repeat(jnp.arange(self.batch, dtype=jnp.int32), queries // self.block_q)

    def items(self, query: jax.Array) -> tuple[jax.Array, ...]:
        """For each block: row, queries [Hkv, group * block_q, D], first, last, (start, stop) of its key blocks."""
        return self.row, self.apart(query), self.first, self.last, self.runs

    def apart(self, array: jax.Array) -> jax.Array:
        """[B, Q, Hq, D] -> [blocks of all rows, Hkv, group * block_q, D]."""
        array = array.reshape(-1, self.block_q, self.kv_heads, self.group, self.dim).transpose(0, 2, 3, 1, 4)
        return array.reshape(-1, self.kv_heads, self.group * self.block_q, self.dim)

    def together(self, array: jax.Array) -> jax.Array:
        """The inverse of ``apart``."""
        array = array.reshape(-1, self.kv_heads, self.group, self.block_q, self.dim).transpose(0, 3, 1, 2, 4)
        return array.reshape(self.batch, -1, self.kv_heads * self.group, self.dim)

    def keys(self, array: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
        """Block j of a row of keys or values [B, Hkv, K, D]: [Hkv, block_kv, D]."""
        sizes = (1, self.kv_heads, self.block_kv, self.dim)
        return lax.dynamic_slice(array, (row, 0, j * self.block_kv, 0), sizes)[0]

    def add(self, array: jax.Array, row: jax.Array, j: jax.Array, block: jax.Array) -> jax.Array:
        """The array with ``block`` added to block j of a row, in place."""
        block = (self.keys(array, row, j) + block)[None]
        return lax.dynamic_update_slice(array, block, (row, 0, j * self.block_kv, 0))

    def scores(self, q: jax.Array, k: jax.Array, first: jax.Array, last: jax.Array, j: jax.Array) -> jax.Array:
        """float32 [Hkv, group * block_q, block_kv], -inf where a key is not seen."""
        s = _product("hqd,hkd->hqk", q, k) * self.dim**-0.5
        index = j * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32)
        seen = (first[:, None] <= index) & (index <= last[:, None])
        return jnp.where(jnp.tile(seen, (self.group, 1)), s, -jnp.inf)
