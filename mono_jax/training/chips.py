"""What one device can do: peak, memory and links from the vendors' data sheets; measured efficiency of matrix
products."""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device in JAX's sense; None = not needed here so far, and not guessed.

    Attributes:
      peak: dense bf16 FLOP/s (half of the figure "with sparsity" if a sheet gives only that one).
      hbm_bytes: memory that a program may use. TPUs: what the compiler allows (GiB as it prints them); GPUs: the 75 %
        of the memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s in one direction, of one ICI link (a TPU has two per axis of its torus), or of all NVLinks
        of a GPU to its machine's switch.
      network_bandwidth: bytes/s in one direction out of the slice or machine, as one device's share.
      products: measured share of ``peak`` that large bf16 matrix products reach; 1 if not measured.
    """

    peak: float
    hbm_bytes: int | None = None
    hbm_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    products: float = 1.0


_GIB = 1 << 30
# On an H200, FFNs of the 2B model run at 640 to 709 TFLOP/s; an H100 is the same processor.
_HOPPER_PRODUCTS = 0.72
_H100 = Chip(989.4e12, int(0.75 * 85_520_809_984), 3.352e12, 450e9, 50e9, _HOPPER_PRODUCTS)
_H200 = Chip(989.4e12, int(0.75 * 151_397_597_184), 4.8e12, 450e9, 50e9, _HOPPER_PRODUCTS)
_V5E = Chip(197e12, int(15.75 * _GIB), 819e9, 45e9, 6.25e9)
_V5P = Chip(459e12, int(95.73 * _GIB), 2765e9, 90e9, 6.25e9)
_V6E = Chip(918e12, int(31.24 * _GIB), 1640e9, 90e9, 12.5e9)

# The key is part of the device's kind.
CHIPS: dict[str, Chip] = {
    "A10": Chip(125e12),
    "A100": Chip(312e12),
    "A800": Chip(312e12),
    "B200": Chip(2250e12),
    "GB200": Chip(2500e12),
    "H20": Chip(148e12),
    "H100": _H100,
    "H100 NVL": Chip(835.5e12),
    "H100 PCIe": Chip(756.5e12),
    "H200": _H200,
    "H200 NVL": Chip(835.5e12),
    "H800": Chip(989.4e12),
    "H800 PCIe": Chip(756.5e12),
    "GH200": Chip(989.4e12),
    "L40S": Chip(362e12),
    "RTX 4090": Chip(165.2e12),  # with float32 accumulation, as XLA multiplies
    "TPU v4": Chip(275e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6": _V6E,
    "TPU v6e": _V6E,
    # A chip with 2307e12 FLOP/s, 7.38e12 bytes/s and 192 GB is two devices, which share its links.
    "TPU7x": Chip(1153.5e12, int(94.74 * _GIB), 3690e9, 45e9, 6.25e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of this kind; None if no data sheet is known.

    Names match as whole words, the longest first: "NVIDIA H100 PCIe" is not an H100 SXM, and "RTX A1000" is not an
    A100.
    """
    for name in sorted(CHIPS, key=len, reverse=True):
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_kind):
            return CHIPS[name]
    return None


def memory_of(device: Any) -> int | None:
    """Bytes that programs may use of a device, which may be absent; None if neither data sheet nor device says."""
    chip = chip_of(device.device_kind)
    if chip is not None and chip.hbm_bytes is not None:
        return chip.hbm_bytes
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except RuntimeError:  # an absent device
        return None
