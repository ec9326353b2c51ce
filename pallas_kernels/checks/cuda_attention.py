"""Compiles packed attention, forward and backward, for an H200 that is not there."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.attention.api import attend
from pallas_kernels.attention.contract import Implementation, Intervals
from pallas_kernels.checks.aot import AotCheck
from pallas_kernels.checks.cuda import TARGET, dumped, h200s, mosaic_facts, require_good
from pallas_kernels.devices import targeting

# (slots, query heads, KV heads, head size): a long row of the 2B model, and a model with heads of 64.
SHAPES = {"16k": (16_384, 16, 8, 128), "heads of 64": (4096, 14, 2, 64)}


def compile_attention(implementation: Implementation, shape: str, dtype: str) -> jax.stages.Compiled:
    """The gradient of a loss over attention of one row; ``Unavailable`` without the CUDA plugin.

    Args:
      implementation: as for ``attend``.
      shape: key of SHAPES.
      dtype: of query, key and value.
    """
    device = h200s(1)[0]
    slots, heads, kv_heads, dim = SHAPES[shape]

    def shaped(*sizes: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, slots, *sizes), dtype, sharding=SingleDeviceSharding(device))

    def loss(query, key, value, first, last, d_output):
        y = attend(query, key, value, Intervals(first, last), implementation=implementation, causal=True)
        return jnp.sum((y * d_output).astype(jnp.float32))

    query, key, bound = shaped(heads, dim), shaped(kv_heads, dim), shaped(dtype="int32")
    with targeting(device):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, key, key, bound, bound, query)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def memory_facts(compiled: jax.stages.Compiled, shape: str) -> dict[str, Any]:
    """Bytes of temporaries; RuntimeError where the program holds an array of all scores."""
    program, slots = compiled.as_text(), SHAPES[shape][0]
    sizes = (list(map(int, found.split(","))) for found in re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", program))
    if any(size.count(slots) >= 2 or math.prod(size) >= 16 * slots**2 for size in sizes):
        raise RuntimeError(f"an array of {slots} x {slots} in the program")
    return {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def mosaic_checks() -> list[AotCheck]:
    """Registers, spills, shared memory, tensor-core and bulk-copy instructions of the three kernels."""
    from pallas_kernels.attention.backends.mosaic import MosaicGpu

    def run(shape: str) -> Mapping[str, Any]:
        with dumped() as folder:
            compiled = compile_attention(MosaicGpu(), shape, "bfloat16")
            kernels = {log.stem.rsplit("_", 1)[0]: mosaic_facts(log) for log in sorted(folder.glob("*.ptxas"))}
        if len(kernels) != 3:
            raise RuntimeError(f"kernels {sorted(kernels)}, expected three")
        for name, facts in kernels.items():
            require_good(name, facts, bulk_copies=True)
        return {**memory_facts(compiled, shape), "kernels": kernels}

    return [AotCheck(TARGET, f"attention {shape}", functools.partial(run, shape)) for shape in SHAPES]


def cudnn_checks() -> list[AotCheck]:
    """One call forward and one backward; which cuDNN kernel serves them is decided on the device."""
    from pallas_kernels.attention.backends.cudnn import Cudnn

    def run(shape: str) -> Mapping[str, Any]:
        compiled = compile_attention(Cudnn(), shape, "bfloat16")
        calls = compiled.as_text().count('custom_call_target="__cudnn$fmha')
        if calls != 2:
            raise RuntimeError(f"{calls} calls of cuDNN, expected one forward and one backward")
        return {**memory_facts(compiled, shape), "kernel_calls": calls}

    return [AotCheck(TARGET, f"attention {shape}", functools.partial(run, shape)) for shape in SHAPES]


def xla_checks() -> list[AotCheck]:
    """What serves float32 there."""
    from pallas_kernels.attention.backends.xla_blocked import XlaBlocked

    def run(shape: str) -> Mapping[str, Any]:
        return memory_facts(compile_attention(XlaBlocked(512, 512), shape, "float32"), shape)

    return [AotCheck(TARGET, f"attention {shape} float32", functools.partial(run, shape)) for shape in SHAPES]
