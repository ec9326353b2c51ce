"""Compiles the TPU kernels with the real compiler for chips that are not there (needs libtpu, no TPU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels import absent
from pallas_kernels.attention.api import attend
from pallas_kernels.attention.contract import Implementation, Intervals
from pallas_kernels.checks.aot import KERNEL_CALLS, AotCheck, compile_ffn, expect_calls, kernel_calls
from pallas_kernels.devices import targeting

# One small slice of each generation; a kernel is compiled for one chip of it.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def chips(target: str) -> list[jax.Device]:
    """The described (absent) chips of ``target``, four of them; ``Unavailable`` without libtpu."""
    return absent.tpus(TOPOLOGIES[target])


def tpu_checks(*, d: int = 256, ff: int = 512, block: int = 128) -> list[AotCheck]:
    """Forward and backward for every chip and for a mesh of four, with both experts trained and with one."""
    from pallas_kernels.experts.backends.tpu import PallasTpu

    def run(target: str, devices: int, trained: str) -> Mapping[str, Any]:
        sizes = {"rows": 4 * block, "d": d, "ff": ff, "block": block, "dtype": jnp.bfloat16}
        compiled = compile_ffn(chips(target)[:devices], PallasTpu(), trained=trained, **sizes)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return {"kernel_calls": expect_calls(compiled, trained), "temporary_bytes": temporary}

    return [
        AotCheck(target, f"ffn gradient{where}, {trained} trained", partial(run, target, devices, trained))
        for target in TOPOLOGIES
        for devices, where in ((1, ""), (4, " on a 2x2 mesh"))
        for trained in KERNEL_CALLS
    ]


def compile_attention(
    target: str,
    implementation: str | Implementation,
    *,
    queries: int,
    keys: int,
    heads: int = 16,
    kv_heads: int = 8,
    dim: int = 128,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> jax.stages.Compiled:
    """Gradients of a loss over attention of one row in bfloat16, compiled for one chip of ``target``.

    The sizes of heads are those of the 2B model; ``remat`` is applied to the attention.
    """
    device = chips(target)[0]

    def shaped(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    @remat
    def mixed(query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        return attend(query, key, value, intervals, implementation=implementation, causal=queries == keys)

    def loss(*arguments: Any) -> jax.Array:
        return jnp.sum(jnp.square(mixed(*arguments).astype(jnp.float32)))

    kv, bound = shaped(1, keys, kv_heads, dim), shaped(1, queries, dtype=jnp.int32)
    arguments = (shaped(1, queries, heads, dim), kv, kv, Intervals(bound, bound))
    with targeting(device):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return gradient.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def attention_checks() -> list[AotCheck]:
    """Forward and backward at the sizes of the 2B model for every chip: rows of S1.1, long ones, and a part of one."""

    def run(target: str, queries: int, keys: int) -> Mapping[str, Any]:
        compiled = compile_attention(target, "pallas_tpu", queries=queries, keys=keys)
        if (calls := kernel_calls(compiled)) != 2:
            raise RuntimeError(f"{calls} kernel calls, expected one forward and one backward")
        if f"{queries},{keys}]" in compiled.as_text():
            raise RuntimeError(f"the program has an array of {queries} x {keys}")
        return {"kernel_calls": calls, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}

    return [
        AotCheck(target, f"attention gradient, {queries} queries, {keys} keys", partial(run, target, queries, keys))
        for target in TOPOLOGIES
        for queries, keys in ((8192, 8192), (11264, 11264), (32768, 32768), (8192, 32768))
    ]
