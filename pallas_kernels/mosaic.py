"""What kernels in Pallas Mosaic GPU share: where they run, and the interpreter where they do not."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.devices import device_key, is_hopper
from pallas_kernels.errors import Unavailable


def interpreter_params() -> Any:
    """Parameters of the interpreter, for ``plgpu.kernel(interpret=...)``; ImportError where jax has none."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # private: there is no public name yet

    return InterpretGPUParams()


def interpreted_here(warpgroups: int) -> bool:
    """False on a Hopper GPU, True on a CPU where the interpreter works; ``Unavailable`` with the reason elsewhere.

    Args:
      warpgroups: of a program.
    """
    if is_hopper(device_key()):
        return False
    try:
        interpreter_params()
    except ImportError as error:
        raise Unavailable(f"no Hopper GPU, and this jax has no interpreter for Mosaic GPU ({error})") from error
    # It runs the warpgroups of a program side by side, and waits forever where XLA has too few threads for that; it
    # has at least one for each device.
    threads = len(jax.local_devices()) if device_key() == "cpu" else 0
    if threads < warpgroups:
        raise Unavailable(
            f"no Hopper GPU, and the interpreter needs {warpgroups} CPU devices, {threads} are there "
            "(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        )
    return True
