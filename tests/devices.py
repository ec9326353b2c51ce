"""Simulated devices for tests."""

from __future__ import annotations

# Most of a test's time goes into compiling: without LLVM's optimisations it takes two thirds, and fusions that are not
# made by way of MLIR take half of that again.
COMPILES_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def simulated(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILES_FAST}"
