"""The FFN's forward and backward compiled ahead of time for accelerators that are not there, one or a mesh of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.experts.api import modality_ffn
from pallas_kernels.experts.contract import FfnWeights, Implementation
from pallas_kernels.experts.mesh import sharded_ffn, sharded_tile_map
from pallas_kernels.registry import targeting

# Kernel calls of one FFN by the experts that are trained: swiglu and down forward, swiglu_backward and dx backward, and
# three weight gradients for each trained expert.
KERNEL_CALLS = {"both": 10, "visual": 7}
# How kernels are called in compiled programs: Pallas on TPU, Mosaic GPU, jax-triton.
_TARGETS = ("tpu_custom_call", "mosaic_gpu", "triton_kernel")


def compile_ffn(
    devices: Sequence[jax.Device],
    implementation: str | Implementation | None,
    *,
    rows: int,
    d: int,
    ff: int,
    tile: int,
    dtype: jnp.dtype,
    trained: str,
) -> jax.stages.Compiled:
    """Gradients of a loss over the FFN compiled for described devices.

    Args:
      devices: one, for `modality_ffn`; or an even number, for `sharded_ffn` with two shards of columns and one shard of
        rows for each pair.
      implementation: as for `modality_ffn`.
      rows: M on one device, N over the whole mesh.
      d: model width.
      ff: hidden width.
      tile: rows per tile.
      dtype: of rows and weights.
      trained: which experts have gradients, "both" or "visual".
    """
    if len(devices) == 1:
        mesh = None
        routing = (rows // tile,), jnp.int32
        forward = partial(_on_one, tile=tile, implementation=implementation)
    else:
        mesh = Mesh(np.array(devices).reshape(-1, 2), ("data", "tensor"))
        routing = (rows,), jnp.bool_
        forward = partial(_on_mesh, mesh=mesh, tile=tile, implementation=implementation)

    def shaped(shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes)) if mesh else SingleDeviceSharding(devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(*arguments):
        return jnp.sum(jnp.square(forward(*arguments).astype(jnp.float32)))

    into = shaped((d, ff), dtype, None, "tensor")
    weights = FfnWeights(into, into, shaped((ff, d), dtype, "tensor"))
    arguments = (shaped((rows, d), dtype, "data"), weights, weights, shaped(*routing, "data"))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2) if trained == "both" else (0, 2)))
    platform = "tpu" if devices[0].platform == "tpu" else "cuda"
    with targeting(devices[0]):
        return gradient.trace(*arguments).lower(lowering_platforms=(platform,)).compile()


def _on_one(x, text, visual, tile_expert, *, tile, implementation):
    return modality_ffn(x, tile_expert, text, visual, tile=tile, implementation=implementation)


def _on_mesh(x, text, visual, mask, *, mesh, tile, implementation):
    tile_map = sharded_tile_map(mask, mesh=mesh, rows=("data",), tile=tile)
    options = {"mesh": mesh, "rows": ("data",), "columns": "tensor", "implementation": implementation}
    return sharded_ffn(x, tile_map, text, visual, **options)


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    """Kernels that a compiled program launches."""
    program = compiled.as_text()
    return sum(program.count(f'custom_call_target="{target}') for target in _TARGETS)


def expect_calls(compiled: jax.stages.Compiled, trained: str) -> int:
    """Kernel calls of a compiled gradient; RuntimeError where there are more or fewer than there should be."""
    if (calls := kernel_calls(compiled)) != KERNEL_CALLS[trained]:
        raise RuntimeError(f"{calls} kernel calls with {trained} trained, expected {KERNEL_CALLS[trained]}")
    return calls
