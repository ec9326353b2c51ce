"""How many devices a run has along each axis of its mesh."""

from __future__ import annotations

import dataclasses

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.axes import AXES
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 = all that remain.

    ``fsdp`` None: as many as the state needs (``parallel.layout.fsdp_for``), or, if ``data`` is given, all that remain.
    """

    data: int = field(-1, ge=-1, help="replicas of the model that share the rows of a batch")
    fsdp: int | None = field(
        None,
        ge=-1,
        help="shards of parameters and of rows; None = enough that parameters, gradients and optimizer state take an "
        "eighth of a device's memory (1 if its size is unknown), or, if `data` is given, all that remain",
    )
    tensor: int = field(1, ge=-1, help="shards of heads and FFN columns")
    context: int = field(
        1,
        ge=-1,
        help="devices that share the slots of each row, for rows too long for one; data.visual_tokens and "
        "data.text_tokens must be multiples of twice this number. Parameters are sharded over it, too",
    )

    def __post_init__(self) -> None:
        strict.check(self, "mesh", ConfigError)
        sizes = [getattr(self, axis) for axis in AXES]
        if 0 in sizes:
            raise ConfigError(f"mesh.{AXES[sizes.index(0)]} is 0: use a number of devices, or -1 for all that remain")
        if sizes.count(-1) > 1:
            raise ConfigError("mesh: only one axis may be -1 (all devices that remain)")
