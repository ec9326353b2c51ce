"""Compiles packed attention, forward and backward, for an absent H200."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.contract import Implementation
from pallas_kernels.checks.aot import AotCheck, compile_attention, expect_no_scores
from pallas_kernels.checks.cuda import TARGET, dumped, h200s, mosaic_facts, require_good

# (slots, query heads, KV heads, head size): a long row of the 2B model, and a model with heads of 64.
SHAPES = {"16k": (16_384, 16, 8, 128), "heads of 64": (4096, 14, 2, 64)}


def compiled_for_h200(
    implementation: Implementation, shape: str, dtype: jnp.dtype = jnp.bfloat16
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """The gradient of attention of one row of ``SHAPES``, and its bytes of temporaries.

    ``Unavailable`` without the CUDA plugin; RuntimeError if the program contains an array of all scores.
    """
    slots, heads, kv_heads, dim = SHAPES[shape]
    sizes = {"queries": slots, "keys": slots, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    compiled = compile_attention(h200s(1)[0], implementation, dtype=dtype, **sizes)
    expect_no_scores(compiled, slots, slots)
    return compiled, {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def mosaic_checks() -> list[AotCheck]:
    """Registers, spills, shared memory, tensor-core and bulk-copy instructions of the three kernels."""
    from pallas_kernels.attention.backends.mosaic import MosaicGpu

    def run(shape: str) -> Mapping[str, Any]:
        with dumped() as folder:
            _, memory = compiled_for_h200(MosaicGpu(), shape)
            kernels = {log.stem.rsplit("_", 1)[0]: mosaic_facts(log) for log in sorted(folder.glob("*.ptxas"))}
        if len(kernels) != 3:
            raise RuntimeError(f"kernels {sorted(kernels)}, expected three")
        for name, facts in kernels.items():
            require_good(name, facts, bulk_copies=True)
        return {**memory, "kernels": kernels}

    return [AotCheck(TARGET, f"attention {shape}", functools.partial(run, shape)) for shape in SHAPES]


def cudnn_checks() -> list[AotCheck]:
    """One call forward and one backward; which cuDNN kernel serves them is decided on the device."""
    from pallas_kernels.attention.backends.cudnn import Cudnn

    def run(shape: str) -> Mapping[str, Any]:
        compiled, memory = compiled_for_h200(Cudnn(), shape)
        calls = compiled.as_text().count('custom_call_target="__cudnn$fmha')
        if calls != 2:
            raise RuntimeError(f"{calls} calls of cuDNN, expected one forward and one backward")
        return {**memory, "kernel_calls": calls}

    return [AotCheck(TARGET, f"attention {shape}", functools.partial(run, shape)) for shape in SHAPES]


def xla_checks() -> list[AotCheck]:
    """The implementation that serves float32 on an H200."""
    from pallas_kernels.attention.backends.xla_blocked import XlaBlocked

    def run(shape: str) -> Mapping[str, Any]:
        return compiled_for_h200(XlaBlocked(512, 512), shape, jnp.float32)[1]

    return [AotCheck(TARGET, f"attention {shape} float32", functools.partial(run, shape)) for shape in SHAPES]
