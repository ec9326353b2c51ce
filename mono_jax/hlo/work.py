"""FLOPs of instructions: dots, convolutions (XLA:TPU's form of dots), GEMM calls, and kernels' own estimates.

Elementwise work is not counted: the matrix unit does none of it, and its time is that of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mono_jax.hlo import shapes
from mono_jax.hlo.module import Computation, Instruction, Module
from mono_jax.hlo.shapes import Array

# Custom calls that are kernels: Pallas on TPU, Mosaic GPU, Triton, cuDNN's attention.
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton", "__cudnn$fmha", "__cudnn$fused")


def flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs (two per multiply-add) of one run of ``instruction``, including those inside a fusion."""
    own = _own_flops(computation, instruction)
    return own + sum(_own_flops(body, inner) for body, inner in module.inside(instruction))


def _own_flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        return _dot(computation, instruction, _dimensions(instruction, "lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        if (instruction.target or "").startswith("__cublas"):
            return _gemm(computation, instruction)
        return float(estimate(instruction).get("flops", 0))
    return 0.0


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel, whose work the compiler knows only if the kernel reports it."""
    return any((instruction.target or "").startswith(name) for name in _KERNELS)


def estimate(instruction: Instruction) -> Mapping[str, float]:
    """A Pallas kernel's own estimate (``pl.CostEstimate``): flops, bytes_accessed, transcendentals; else {}."""
    found = instruction.backend_config.get("custom_call_config", {}).get("cost_estimate", {})
    return {name: float(value) for name, value in found.items()}


def _dimensions(instruction: Instruction, name: str) -> list[int]:
    return [int(axis) for axis in (instruction.attribute(name) or "").strip("{}").split(",") if axis.strip()]


def _dot(computation: Computation, instruction: Instruction, contracted: list[int]) -> float:
    left = computation.arrays(instruction)[0]
    output = next(shapes.arrays(instruction.shape))
    return 2.0 * output.size * math.prod(left.dims[axis] for axis in contracted)


def _gemm(computation: Computation, instruction: Instruction) -> float:
    """A cuBLAS call; its dimension numbers are in the backend config."""
    config = instruction.backend_config.get("gemm_backend_config", instruction.backend_config)
    numbers = config.get("dot_dimension_numbers", {}).get("lhs_contracting_dimensions", ())
    return _dot(computation, instruction, [int(axis) for axis in numbers])


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Window positions outside the input do not count: with them, XLA:TPU writes a dot of several dimensions."""
    labels = instruction.attribute("dim_labels") or ""
    left, right, out = labels.replace("->", "_").split("_")
    image, kernel = computation.arrays(instruction)[:2]
    output = next(shapes.arrays(instruction.shape))
    window = dict(part.split("=") for part in (instruction.attribute("window") or "{}").strip("{}").split())
    total = 2.0 * _size(output, out, "b") * _size(output, out, "f") * _size(kernel, right, "i")
    for place, label in enumerate(sorted(letter for letter in out if letter.isdecimal())):
        total *= _positions(
            _size(image, left, label), _size(output, out, label), _size(kernel, right, label), window, place
        )
    return total


def _size(array: Array, labels: str, label: str) -> int:
    return array.dims[labels.index(label)] if label in labels else 1


def _positions(image: int, output: int, kernel: int, window: Mapping[str, str], place: int) -> int:
    """Pairs (output position, window position) that read the image and not its padding, along one dimension."""

    def of(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    stride, dilation, spread = int(of("stride", "1")), int(of("rhs_dilate", "1")), int(of("lhs_dilate", "1"))
    before = int(of("pad", "0_0").split("_")[0])
    read = np.arange(output)[:, None] * stride + np.arange(kernel)[None] * dilation - before
    return int(((read >= 0) & (read <= (image - 1) * spread) & (read % spread == 0)).sum())
