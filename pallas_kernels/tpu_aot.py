"""Compiles the TPU kernels with the real compiler for chips that are not there (needs libtpu, no TPU)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.base import AotCheck, FfnWeights, Implementation, Unavailable

# One small slice of each generation; a kernel is compiled for one chip of it.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Kernel calls of one FFN, forward and backward: swiglu, down, swiglu_backward, dx, and 3 weight gradients per expert.
KERNELS = {"both": 10, "visual": 7}


def chips(target: str) -> list[jax.Device]:
    """The described (absent) chips of `target`, four of them; `Unavailable` without libtpu."""
    from jax.experimental import topologies

    # libtpu asks a metadata server who it is unless told.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # A compiler needs no chip to itself: without this, a second process that compiles is refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu").devices
    except Exception as error:  # whatever the plugin raises when it cannot start
        raise Unavailable(f"TPU compiler: {str(error).splitlines()[0]} (pip install libtpu)") from error


def chip(target: str) -> jax.Device:
    """One described chip of `target`."""
    return chips(target)[0]


def compile_ffn(
    implementation: Implementation,
    device: jax.Device,
    *,
    rows: int,
    d: int,
    ff: int,
    tile: int,
    dtype: jnp.dtype,
    trained: str,
) -> jax.stages.Compiled:
    """Gradient of `modality_ffn` compiled for `device`; `trained`: which experts have gradients, "both" or "visual"."""
    from pallas_kernels.api import modality_ffn
    from pallas_kernels.registry import targeting

    def loss(x, tile_expert, text, visual):
        y = modality_ffn(x, tile_expert, text, visual, tile=tile, implementation=implementation)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    sharding = jax.sharding.SingleDeviceSharding(device)
    shaped = partial(jax.ShapeDtypeStruct, sharding=sharding)
    weights = FfnWeights(shaped((d, ff), dtype), shaped((d, ff), dtype), shaped((ff, d), dtype))
    arguments = (shaped((rows, d), dtype), shaped((rows // tile,), jnp.int32), weights, weights)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 2, 3) if trained == "both" else (0, 3)))
    with targeting(device):
        return gradient.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def kernel_calls(compiled: jax.stages.Compiled) -> int:
    """Pallas calls in a compiled TPU program."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def checks(implementation: Implementation, *, d: int = 256, ff: int = 512, tile: int = 128) -> list[AotCheck]:
    """Forward and backward for every chip and for a mesh of four, with both experts trained and with one."""

    def run(target: str, on_mesh: bool, trained: str) -> Mapping[str, Any]:
        from pallas_kernels.aot_mesh import compile_sharded_ffn

        sizes = {"rows": 4 * tile, "d": d, "ff": ff, "tile": tile, "dtype": jnp.bfloat16, "trained": trained}
        if on_mesh:
            compiled = compile_sharded_ffn(chips(target), implementation, **sizes)
        else:
            compiled = compile_ffn(implementation, chip(target), **sizes)
        calls = kernel_calls(compiled)
        if calls != KERNELS[trained]:
            raise AssertionError(f"{calls} kernel calls, expected {KERNELS[trained]}")
        return {"kernel_calls": calls, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}

    return [
        AotCheck(target, f"ffn gradient{where}, {trained} trained", partial(run, target, bool(where), trained))
        for target in TOPOLOGIES
        for where in ("", " on a 2x2 mesh")
        for trained in KERNELS
    ]
