"""Simulated devices for tests."""

from __future__ import annotations

import os

# Most of a test's time goes into compiling: without LLVM's optimisations it takes two thirds, and without MLIR's
# fusions a third of that.
WITHOUT_MLIR = "--xla_cpu_use_fusion_emitters=false"
COMPILES_FAST = f"--xla_backend_optimization_level=0 {WITHOUT_MLIR}"


def simulated(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILES_FAST}"


def simulate(devices: int) -> None:
    """In this process, unless its environment says what XLA shall do."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", simulated(devices))
    import jax

    jax.devices()  # XLA reads its flags now; libtpu, which is loaded later, ends the process at one it does not know
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(WITHOUT_MLIR, "").strip()
