"""How many devices a run has along each axis of its mesh."""

from __future__ import annotations

import dataclasses

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 = all that remain.

    Attributes:
      data: copies of the model that share the rows of a batch.
      fsdp: shards of parameters and of rows.
      tensor: shards of heads and FFN columns.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
