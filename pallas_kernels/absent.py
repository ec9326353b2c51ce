"""Descriptions of absent devices, for which programs are compiled ahead of time."""

from __future__ import annotations

import os
from importlib import resources

import jax

from pallas_kernels.errors import Unavailable

# GPUs are described by a text that XLA reads. The entries are the differences from the H200, of the same generation.
_GPUS: dict[str, dict[str, str]] = {
    "h200": {},
    "h100": {
        "NVIDIA H200": "NVIDIA H100 80GB HBM3",
        "memory_bandwidth: 4800000000000": "memory_bandwidth: 3352000000000",
        "device_memory_size: 151397597184": "device_memory_size: 85520809984",
    },
}


def tpus(topology: str) -> list[jax.Device]:
    """The chips of a slice such as "v5e:4x4" or "v5p:2x2x1"; ``Unavailable`` if libtpu is missing or rejects it."""
    from jax.experimental import topologies

    # Otherwise libtpu queries a metadata server for its identity.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Compiling needs no exclusive chip, but without this a second compiling process is refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # whatever the plugin raises when it cannot start
        raise Unavailable(f"TPU compiler: {str(error).splitlines()[0]} (pip install libtpu)") from error


def gpus(kind: str, topology: str) -> list[jax.Device]:
    """The GPUs of "h200" or "h100", topology "1 x machines x GPUs of one"; ``Unavailable`` without the CUDA plugin."""
    from jax.experimental import topologies

    try:
        options = {"topology": topology, "target_config": gpu_description(kind)}
        return list(topologies.get_topology_desc(kind, platform="cuda", **options).devices)
    except Exception as error:  # whatever jax raises when the plugin is absent or cannot start
        hint = "pip install 'jax[cuda13]'; without a GPU set JAX_PLATFORMS=cpu"
        raise Unavailable(f"CUDA compiler: {str(error).splitlines()[0]} ({hint})") from error


def gpu_description(kind: str) -> str:
    """XLA's description of a GPU; raises KeyError for an unknown kind."""
    changes = _GPUS[kind]
    text = (resources.files("pallas_kernels") / "targets" / "h200.txtpb").read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text
