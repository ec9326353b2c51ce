"""Settings of the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError
from mono_jax.training.stages import GROUPS, Schedule

OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Settings of one parameter group; None = as in ``OptimConfig``."""

    optimizer: OptimizerName | None = field(None, help="its optimizer")
    learning_rate: float | None = field(None, ge=0, help="its peak learning rate")
    schedule: Schedule | None = field(None, help="its schedule")
    weight_decay: float | None = field(None, ge=0, help="its weight decay")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer; None = the stage's own."""

    optimizer: OptimizerName = field(
        "adamw", help='optax\'s optimizer; "muon" = Muon for the kernels of the decoder layers, AdamW for the rest'
    )
    learning_rate: float | None = field(None, ge=0, help="peak learning rate; None = the stage's")
    schedule: Schedule | None = field(
        None,
        help='after the warm-up: "constant", "cosine" or "linear" down to `end`, or "wsd" (constant, then linear down '
        "to `end` over the last `decay` of the steps); None = the stage's",
    )
    warmup: float | None = field(
        None, ge=0, le=1, help="fraction of all steps in which the learning rate rises linearly"
    )
    warmup_steps: int | None = field(None, ge=0, help="the same as a number of steps")
    decay: float = field(0.1, gt=0, le=1, help='with "wsd": fraction of all steps in which the learning rate falls')
    end: float = field(0.0, ge=0, le=1, help="learning rate at the end, as a fraction of the peak")
    weight_decay: float | None = field(
        None, ge=0, help="decoupled weight decay on kernels and embeddings; None = the stage's"
    )
    b1: float | None = field(None, ge=0, lt=1, help="decay rate of the first moment; None = the optimizer's own")
    b2: float | None = field(None, ge=0, lt=1, help="decay rate of the second moment; None = the optimizer's own")
    eps: float = field(1e-8, gt=0, help="epsilon of AdamW")
    clip_norm: float = field(1.0, ge=0, help="largest global norm of the trainable gradients; 0 = no clipping")
    groups: Mapping[str, GroupConfig] = field(
        default_factory=dict, choices=tuple(GROUPS), help="{parameter group: its own settings}"
    )

    def __post_init__(self) -> None:
        strict.check(self, "optim", ConfigError)
        if self.warmup is not None and self.warmup_steps is not None:
            raise ConfigError("optim.warmup and optim.warmup_steps are both given: give only one")
