"""Which compilations for absent hardware belong to which implementation."""

from __future__ import annotations

from collections.abc import Callable

from pallas_kernels.checks import cuda, cuda_attention, tpu
from pallas_kernels.checks.aot import AotCheck

# By name in `registry.IMPLEMENTATIONS`; the others are left to XLA and need none.
AOT_CHECKS: dict[str, Callable[[], list[AotCheck]]] = {
    "pallas_tpu": tpu.tpu_checks,
    "mosaic_gpu": cuda.mosaic_checks,
    "triton": cuda.triton_checks,
    "attention/pallas_tpu": tpu.attention_checks,
    "attention/mosaic_gpu": cuda_attention.mosaic_checks,
    "attention/cudnn": cuda_attention.cudnn_checks,
    "attention/xla_blocked": cuda_attention.xla_checks,
}


def aot_checks(name: str) -> list[AotCheck]:
    """The compilations of an implementation, whose module must be importable."""
    return AOT_CHECKS[name]() if name in AOT_CHECKS else []
