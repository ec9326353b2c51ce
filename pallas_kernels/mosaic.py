"""Shared by the Pallas Mosaic GPU kernels: where they run, and the interpreter for other machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from pallas_kernels.devices import device_key, is_hopper
from pallas_kernels.errors import Unavailable


class Problem(Protocol):
    """The fields that all problems have."""

    dtype: str
    device: str


def refusal(problem: Problem, interpret: Any) -> str | None:
    """Why no kernel of this kind can serve ``problem``, or None; ``interpret`` is that of the implementation."""
    if not (interpret or is_hopper(problem.device)):
        return f"needs a Hopper GPU (H100, H200, GH200), not {problem.device}"
    if problem.dtype != "bfloat16":
        return f"{problem.dtype} inputs: the tensor cores would round them to tf32; bfloat16 only"
    return None


def read_configs(implementation: Any) -> None:
    """For __post_init__: applies fields that a tuning table gives as mappings as changes to the class's defaults."""
    for field in dataclasses.fields(implementation):
        if isinstance(value := getattr(implementation, field.name), Mapping):
            object.__setattr__(implementation, field.name, dataclasses.replace(field.default, **value))


def interpreter_params() -> Any:
    """Parameters of the interpreter, for ``plgpu.kernel(interpret=...)``; ImportError where jax has none."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # private: there is no public name yet

    return InterpretGPUParams()


def interpreted_here(warpgroups: int) -> bool:
    """False on a Hopper GPU, True on a CPU where the interpreter works; ``Unavailable`` with the reason elsewhere.

    Args:
      warpgroups: warpgroups of a program.
    """
    if is_hopper(device_key()):
        return False
    try:
        interpreter_params()
    except ImportError as error:
        raise Unavailable(f"no Hopper GPU, and this jax has no interpreter for Mosaic GPU ({error})") from error
    # The interpreter runs the warpgroups of a program concurrently, and hangs if XLA has too few threads for that; XLA
    # has at least one for each device.
    threads = len(jax.local_devices()) if device_key() == "cpu" else 0
    if threads < warpgroups:
        raise Unavailable(
            f"no Hopper GPU, and the interpreter needs {warpgroups} CPU devices, but there are {threads} "
            "(JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        )
    return True
