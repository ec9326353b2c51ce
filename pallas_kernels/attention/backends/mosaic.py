"""Packed attention for Hopper GPUs in Pallas Mosaic GPU: three kernels, their gradient rule, and the implementation.

``mosaic_loop`` has the loop that the kernels are built on, and says what each of them owns and iterates over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.backends.mosaic_loop import (
    LOG2E,
    NO_MAXIMUM,
    TILE,
    WARPGROUPS,
    WG_ROWS,
    Config,
    Transposed,
    Walk,
    accumulate,
    along,
    products,
    tile_kernel,
    visible,
)
from pallas_kernels.attention.contract import LSE, OUTPUT, Implementation, Intervals, Problem, needs_order
from pallas_kernels.attention.spans import key_spans, query_spans
from pallas_kernels.mosaic import interpreted_here, read_configs, refusal

_LANES = 64  # head sizes come in multiples of the 128 bytes that TMA swizzles


# ======================================================================================================================
# The kernels
# ======================================================================================================================


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(output [B, Q, Hq, D], log2 of the sum of exponentials float32 [B, Hq, Q]).

    Args:
      query: [B, Q, Hq, D] bfloat16; Q a multiple of 128, D of 64.
      key: [B, K, Hkv, D]; K a multiple of 128.
      value: likewise.
      first: int32 [B, Q], first key that each query sees, ascending along the row.
      last: int32 [B, Q], last key, likewise.
      scale: of the scores.
      config: rows of a key block and stages of the ring.
      interpret: run in the interpreter: True, or its parameters.
    """
    batch, queries, heads, dim = query.shape
    group, dtype, shape = heads // key.shape[2], query.dtype, (WG_ROWS, config.block)
    exponent = scale * LOG2E

    def step(walk: Walk, at: jax.Array, slot: jax.Array, carried: Any, mask: bool) -> Any:
        output, maximum, total = carried
        walk.wait(0, slot)
        (s,) = products(interpret, (walk.own["q"], Transposed(walk.ring["k"].at[slot])))
        walk.release(0, slot)
        if mask:
            bounds = walk.own["first"][...], walk.own["last"][...]
            s = jnp.where(visible(*bounds, shape, keys_from=at * config.block, keys=1), s, -jnp.inf)
        new_maximum = jnp.maximum(maximum, s.max(axis=1) * exponent)
        shrink = jnp.exp2(maximum - new_maximum)
        p = jnp.exp2(s * exponent - along(new_maximum, shape))
        total = total * shrink + p.sum(axis=1)
        output = output * along(shrink, output.shape)
        walk.wait(1, slot)
        output = accumulate(interpret, output, p.astype(dtype), walk.ring["v"].at[slot])
        walk.release(1, slot)
        return output, new_maximum, total

    def init() -> Any:
        zeros = jnp.zeros((WG_ROWS,), jnp.float32)
        return jnp.zeros((WG_ROWS, dim), jnp.float32), jnp.full((WG_ROWS,), NO_MAXIMUM, jnp.float32), zeros

    def finish(walk: Walk, carried: Any) -> None:
        output, maximum, total = carried
        walk.own["q"][...] = (output / along(total, output.shape)).astype(dtype)
        walk.own["lse"][...] = maximum + jnp.log(total) * LOG2E

    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    return tile_kernel(
        "attention_forward",
        own={"q": query, "first": first, "last": last},
        ring=[{"k": key}, {"v": value}],
        outputs={"out": (jax.ShapeDtypeStruct(query.shape, dtype), "q"), "lse": (lse, "lse")},
        spans=key_spans(first, last, TILE, config.block),
        heads=heads,
        own_head=lambda head: head,
        ring_head=lambda head, _: lax.div(head, jnp.int32(group)),
        repeats=1,
        config=config,
        init=init,
        step=step,
        finish=finish,
        interpret=interpret,
    )


def query_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    last: jax.Array,
    d_output: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    config: Config,
    interpret: Any = False,
) -> jax.Array:
    """Gradient of the queries, in their shape and dtype.

    Args:
      query: as for ``forward``, and so are the arguments up to ``last``.
      key: ...
      value: ...
      first: ...
      last: ...
      d_output: [B, Q, Hq, D], cotangent of the output.
      lse: from ``forward``.
      delta: float32 [B, Hq, Q], sum of output * d_output over D.
      scale: of the scores.
      config: rows of a key block and stages of the ring.
      interpret: run in the interpreter: True, or its parameters.
    """
    heads, dim = query.shape[2:]
    group, dtype, shape = heads // key.shape[2], query.dtype, (WG_ROWS, config.block)

    def step(walk: Walk, at: jax.Array, slot: jax.Array, dq: jax.Array, mask: bool) -> jax.Array:
        walk.wait(0, slot)
        walk.wait(1, slot)
        k = walk.ring["k"].at[slot]
        s, dp = products(
            interpret,
            (walk.own["q"], Transposed(k)),
            (walk.own["do"], Transposed(walk.ring["v"].at[slot])),
        )
        walk.release(1, slot)
        p = jnp.exp2(s * (scale * LOG2E) - along(walk.own["lse"][...], shape))
        if mask:
            bounds = walk.own["first"][...], walk.own["last"][...]
            p = jnp.where(visible(*bounds, shape, keys_from=at * config.block, keys=1), p, 0.0)
        ds = p * (dp - along(walk.own["delta"][...], shape))
        dq = accumulate(interpret, dq, ds.astype(dtype), k)
        walk.release(0, slot)
        return dq

    def finish(walk: Walk, dq: jax.Array) -> None:
        walk.own["q"][...] = (dq * scale).astype(dtype)

    (dq,) = tile_kernel(
        "attention_dq",
        own={"q": query, "do": d_output, "first": first, "last": last, "lse": lse, "delta": delta},
        ring=[{"k": key}, {"v": value}],
        outputs={"dq": (jax.ShapeDtypeStruct(query.shape, dtype), "q")},
        spans=key_spans(first, last, TILE, config.block),
        heads=heads,
        own_head=lambda head: head,
        ring_head=lambda head, _: lax.div(head, jnp.int32(group)),
        repeats=1,
        config=config,
        init=lambda: jnp.zeros((WG_ROWS, dim), jnp.float32),
        step=step,
        finish=finish,
        interpret=interpret,
    )
    return dq


def key_value_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    last: jax.Array,
    d_output: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values, in their shape and dtype, summed over the query heads that share them.

    Arguments as for ``query_gradient``; ``config`` has the rows of a query block.
    """
    keys, kv_heads, dim = key.shape[1:]
    group, dtype, shape = query.shape[2] // kv_heads, key.dtype, (WG_ROWS, config.block)

    def step(walk: Walk, at: jax.Array, slot: jax.Array, carried: Any, mask: bool) -> Any:
        dk, dv = carried
        q, do = (walk.ring[n].at[slot] for n in ("q", "do"))
        walk.wait(0, slot)
        walk.wait(1, slot)
        (s,) = products(interpret, (walk.own["k"], Transposed(q)))
        p = jnp.exp2(s * (scale * LOG2E) - along(walk.ring["lse"][slot], shape, 1))
        if mask:
            bounds = walk.ring["first"][slot], walk.ring["last"][slot]
            p = jnp.where(visible(*bounds, shape, keys_from=walk.first_row, keys=0), p, 0.0)
        dv = accumulate(interpret, dv, p.astype(dtype), do)
        (dp,) = products(interpret, (walk.own["v"], Transposed(do)))
        ds = p * (dp - along(walk.ring["delta"][slot], shape, 1))
        walk.release(1, slot)
        dk = accumulate(interpret, dk, ds.astype(dtype), q)
        walk.release(0, slot)
        return dk, dv

    def init() -> Any:
        return jnp.zeros((WG_ROWS, dim), jnp.float32), jnp.zeros((WG_ROWS, dim), jnp.float32)

    def finish(walk: Walk, carried: Any) -> None:
        dk, dv = carried
        walk.own["k"][...] = (dk * scale).astype(dtype)
        walk.own["v"][...] = dv.astype(dtype)

    like = jax.ShapeDtypeStruct(key.shape, dtype)
    return tile_kernel(
        "attention_dkv",
        own={"k": key, "v": value},
        ring=[{"q": query, "lse": lse, "first": first, "last": last}, {"do": d_output, "delta": delta}],
        outputs={"dk": (like, "k"), "dv": (like, "v")},
        spans=query_spans(first, last, keys, config.block, TILE),
        heads=kv_heads,
        own_head=lambda head: head,
        ring_head=lambda head, repeat: head * group + repeat,
        repeats=group,
        config=config,
        init=init,
        step=step,
        finish=finish,
        interpret=interpret,
    )


# ======================================================================================================================
# The implementation
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class MosaicGpu(Implementation):
    """The kernels above as an implementation of the contract; a ``Config`` may be given as a dict (from JSON).

    Attributes:
      output: how ``forward`` iterates over the keys.
      dquery: how ``query_gradient`` iterates over the keys.
      dkeys: how ``key_value_gradients`` iterates over the queries.
      interpret: run in the interpreter, on the CPU; True, or its parameters (race detection).
    """

    name: ClassVar[str] = "attention/mosaic_gpu"

    output: Config = Config()
    dquery: Config = Config(block=64, stages=4)
    dkeys: Config = Config(block=64, stages=4)
    interpret: Any = False

    def __post_init__(self) -> None:
        read_configs(self)

    def unsupported(self, problem: Problem) -> str | None:
        if reason := refusal(problem, self.interpret):
            return reason
        if problem.dim > 128:
            return f"needs a head size up to 128, not {problem.dim}: the accumulators would not fit into registers"
        return needs_order(problem)

    @classmethod
    def here(cls) -> Self:
        return cls(interpret=interpreted_here(WARPGROUPS))

    @classmethod
    def tuning_space(cls) -> dict[str, list[Any]]:
        return {
            "output": [{"block": 64, "stages": 4}, {"block": 64, "stages": 3}],
            "dquery": [{"stages": 2}, {"stages": 3}],
            "dkeys": [{"stages": 2}, {"stages": 3}],
        }

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        # Rows and heads are padded to whole blocks; no interval reaches the zero keys after the last one.
        queries, dim = query.shape[1], query.shape[3]
        query, key, value = (_pad(a, {1: TILE, 3: _LANES}) for a in (query, key, value))
        first, last = (_pad(bound, {1: TILE}, mode="edge") for bound in (intervals.first, intervals.last))
        return _attention(self, dim**-0.5, query, key, value, first, last)[:, :queries, :, :dim]


def _pad(array: jax.Array, multiples: Mapping[int, int], **mode: Any) -> jax.Array:
    """Pads axes to multiples."""
    return jnp.pad(array, [(0, -n % multiples.get(axis, 1)) for axis, n in enumerate(array.shape)], **mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels: MosaicGpu, scale: float, query, key, value, first, last) -> jax.Array:
    return _forward(kernels, scale, query, key, value, first, last)[0]


def _forward(kernels: MosaicGpu, scale: float, query, key, value, first, last) -> tuple[jax.Array, Any]:
    output, lse = forward(
        query, key, value, first, last, scale=scale, config=kernels.output, interpret=kernels.interpret
    )
    # Names for remat policies: if both are saved, the backward pass does not run the kernel again.
    output, lse = checkpoint_name(output, OUTPUT), checkpoint_name(lse, LSE)
    return output, (query, key, value, first, last, output, lse)


def _backward(kernels: MosaicGpu, scale: float, residuals: Any, d_output: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, output, lse = residuals
    wide = (a.astype(jnp.float32) for a in (output, d_output))
    # The factors are bfloat16 numbers, which TF32 multiplies exactly.
    delta = jnp.einsum("bqhd,bqhd->bhq", *wide, precision="default")
    arguments, options = (*inputs, d_output, lse, delta), {"scale": scale, "interpret": kernels.interpret}
    dquery = query_gradient(*arguments, config=kernels.dquery, **options)
    dkey, dvalue = key_value_gradients(*arguments, config=kernels.dkeys, **options)
    return dquery, dkey, dvalue, None, None


_attention.defvjp(_forward, _backward)
