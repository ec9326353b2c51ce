"""Simulated devices for tests."""

from __future__ import annotations


def simulated(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices.

    Most of a test's time goes into compiling: without LLVM's optimisations it takes two thirds.
    """
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
