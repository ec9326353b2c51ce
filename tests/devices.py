"""Simulated devices for tests."""

from __future__ import annotations

import os

# Compilation takes most of a test's time. Without LLVM's optimisations it takes two thirds as long, and without MLIR's
# fusions a third of that.
WITHOUT_MLIR = "--xla_cpu_use_fusion_emitters=false"
COMPILES_FAST = f"--xla_backend_optimization_level=0 {WITHOUT_MLIR}"


def simulated(devices: int) -> str:
    """XLA_FLAGS of a process with this number of CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILES_FAST}"


def simulate(devices: int) -> None:
    """Sets the flags in this process, unless its environment already has flags for XLA."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", simulated(devices))
    import jax

    jax.devices()  # XLA reads its flags now; libtpu, which is loaded later, ends the process at any unknown flag
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(WITHOUT_MLIR, "").strip()
