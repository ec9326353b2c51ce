"""Compiles the TPU kernels with the real compiler for absent chips (needs libtpu, but no TPU)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import absent
from pallas_kernels.checks.aot import (
    KERNEL_CALLS,
    AotCheck,
    compile_attention,
    compile_ffn,
    expect_calls,
    expect_no_scores,
    kernel_calls,
)

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


def attention_checks() -> list[AotCheck]:
    """Forward and backward at the sizes of the 2B model for every chip: rows of S1.1, long rows, and part of a row."""

    def run(target: str, queries: int, keys: int) -> Mapping[str, Any]:
        compiled = compile_attention(chips(target)[0], "pallas_tpu", queries=queries, keys=keys)
        if (calls := kernel_calls(compiled)) != 2:
            raise RuntimeError(f"{calls} kernel calls, expected one forward and one backward")
        expect_no_scores(compiled, queries, keys)
        return {"kernel_calls": calls, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}

    return [
        AotCheck(target, f"attention gradient, {queries} queries, {keys} keys", partial(run, target, queries, keys))
        for target in TOPOLOGIES
        for queries, keys in ((8192, 8192), (11264, 11264), (32768, 32768), (8192, 32768))
    ]
