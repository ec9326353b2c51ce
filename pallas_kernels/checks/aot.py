"""Forward and backward of the FFN and of attention, compiled ahead of time for absent accelerators."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.attention.api import attend
from pallas_kernels.attention.contract import Implementation as AttentionImplementation
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.devices import compiled_for, targeting
from pallas_kernels.experts.contract import FfnWeights, Implementation
from pallas_kernels.experts.mesh import sharded_block_map, sharded_ffn

# Kernel calls of one FFN, by which experts are trained: swiglu and down forward, swiglu_backward and dx backward, and
# three weight gradients for each trained expert.
KERNEL_CALLS = {"both": 10, "visual": 7}
# Names of kernel calls in compiled programs: Pallas on TPU, Mosaic GPU, jax-triton.
_TARGETS = ("tpu_custom_call", "mosaic_gpu", "triton_kernel")


class AotCheck(NamedTuple):
    """One ahead-of-time compilation by a real compiler.

    ``run`` returns facts (registers, spills, bytes of shared memory...). It raises ``Unavailable`` if the compiler is
    not installed, and any other exception if the code does not compile or does not meet the requirements.
    """

    target: str
    name: str
    run: Callable[[], Mapping[str, Any]]


def compile_ffn(
    devices: Sequence[jax.Device],
    implementation: str | Implementation | None,
    *,
    rows: int,
    d: int,
    ff: int,
    block: int,
    dtype: jnp.dtype,
    trained: str,
) -> jax.stages.Compiled:
    """Gradients of a loss over the FFN, compiled for described devices.

    Args:
      devices: one, with rows already grouped; or an even number, with rows in any order, two shards of columns and one
        shard of rows for each pair.
      implementation: as for ``modality_ffn``.
      rows: M on one device, N over the whole mesh.
      d: model width.
      ff: hidden width.
      block: rows per block.
      dtype: of rows and weights.
      trained: which experts have gradients, "both" or "visual".
    """
    if len(devices) == 1:
        mesh, device_or_mesh = None, targeting(devices[0])
        routing = (rows // block,), jnp.int32
    else:
        mesh = Mesh(np.array(devices).reshape(-1, 2), ("data", "tensor"))
        device_or_mesh = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        routing = (rows,), jnp.bool_

    def shaped(shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes)) if mesh else SingleDeviceSharding(devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(x: jax.Array, text: FfnWeights, visual: FfnWeights, routing: jax.Array) -> jax.Array:
        options = {"rows": ("data",), "columns": "tensor", "block": block, "implementation": implementation}
        if mesh is not None:
            routing = sharded_block_map(routing, rows=("data",), block=block)
        y = sharded_ffn(x, routing, text, visual, **options)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    into = shaped((d, ff), dtype, None, "tensor")
    weights = FfnWeights(into, into, shaped((ff, d), dtype, "tensor"))
    arguments = (shaped((rows, d), dtype, "data"), weights, weights, shaped(*routing, "data"))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if trained == "both" else (0, 2)))
    with device_or_mesh:
        return compiled_for(devices[0], gradient.trace(*arguments))


def compile_attention(
    device: jax.Device,
    implementation: str | AttentionImplementation,
    *,
    queries: int,
    keys: int,
    heads: int = 16,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: jnp.dtype = jnp.bfloat16,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> jax.stages.Compiled:
    """Gradients of a loss over attention of one row, compiled for a described device.

    Numbers and sizes of heads default to those of the 2B model; ``remat`` is applied to the attention.
    """

    def shaped(*shape: int, dtype: jnp.dtype = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=SingleDeviceSharding(device))

    @remat
    def mixed(query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals) -> jax.Array:
        return attend(query, key, value, intervals, implementation=implementation, causal=queries == keys)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, intervals: Intervals, dy: jax.Array) -> jax.Array:
        y = mixed(query, key, value, intervals).astype(jnp.float32)
        return jnp.sum(y * y * dy)  # its gradient needs y: the forward pass cannot be left out

    query, key, bound = shaped(queries, heads, dim), shaped(keys, kv_heads, dim), shaped(queries, dtype=jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with targeting(device):
        return compiled_for(device, gradient.trace(query, key, key, Intervals(bound, bound), query))


def expect_no_scores(compiled: jax.stages.Compiled, queries: int, keys: int) -> None:
    """Raises RuntimeError if compiled attention contains an array of all scores of a row, in one or more dimensions."""
    for found in re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", compiled.as_text()):
        sizes = list(map(int, found.split(",")))
        both = sizes.count(queries) >= 2 if queries == keys else {queries, keys} <= set(sizes)
        if both or math.prod(sizes) >= 16 * queries * keys:
            raise RuntimeError(f"an array of {queries} x {keys} in the program: [{found}]")


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    """Number of kernels that a compiled program launches."""
    program = compiled.as_text()
    return sum(program.count(f'custom_call_target="{target}') for target in _TARGETS)


def expect_calls(compiled: jax.stages.Compiled, trained: str) -> int:
    """Number of kernel calls of a compiled gradient; raises RuntimeError if it is not the expected number."""
    if (calls := kernel_calls(compiled)) != KERNEL_CALLS[trained]:
        raise RuntimeError(f"{calls} kernel calls with {trained} trained, expected {KERNEL_CALLS[trained]}")
    return calls
