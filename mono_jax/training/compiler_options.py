"""XLA options for the step, by chip, that compile it better than the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from pallas_kernels.devices import device_key

OPTIONS: dict[str, dict[str, Any]] = {
    # A gather of weights split into steps rewrites the whole product in every step; a single gather before it does not.
    "tpu_v5e": {"xla_tpu_enable_windowed_einsum_for_all_gather": False},
}


def compiler_options(mesh: Mesh, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options for the devices of ``mesh``, with ``changes`` of a config; an option set to None is left to XLA."""
    chosen = OPTIONS.get(device_key(mesh.devices.flat[0]), {}) | dict(changes or {})
    return {name: value for name, value in chosen.items() if value is not None}
