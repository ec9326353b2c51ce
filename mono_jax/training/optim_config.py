"""Settings of the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mono_jax.errors import ConfigError, unknown_key
from mono_jax.training.stages import GROUPS, Schedule

OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """What a parameter group has of its own; None = as ``OptimConfig`` says."""

    optimizer: OptimizerName | None = None
    learning_rate: float | None = None
    schedule: Schedule | None = None
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer; None = the stage's own.

    Attributes:
      optimizer: "adamw", "adafactor", "lion" or "muon" (matrices by Muon, the rest by AdamW), all optax's.
      learning_rate: peak.
      schedule: after the warm-up, "constant", "cosine" or "linear" down to ``end``, or "wsd" (constant, then linear
        down to ``end`` over the last ``decay`` of all steps).
      warmup: fraction of all steps with a linearly growing rate; or ``warmup_steps``.
      end: learning rate at the end, as a fraction of the peak.
      weight_decay: decoupled, on kernels and embeddings.
      b1, b2: decay rates of the moments; None = the optimizer's own. eps: of AdamW.
      clip_norm: largest global norm of the trainable gradients; 0 = no clipping.
      groups: {group: settings of its own}.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup: float | None = None
    warmup_steps: int | None = None
    decay: float = 0.1
    end: float = 0.0
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float = 1e-8
    clip_norm: float = 1.0
    groups: Mapping[str, GroupConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            if group not in GROUPS:
                raise unknown_key("parameter group", group, GROUPS)
        if self.warmup is not None and self.warmup_steps is not None:
            raise ConfigError("optim.warmup and optim.warmup_steps are both given: give one")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimConfig:
        """Raises ConfigError that names the nearest valid key."""
        names = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise unknown_key("optim key", key, names)
        values = dict(values)
        values["groups"] = {name: GroupConfig(**group) for name, group in (values.get("groups") or {}).items()}
        return cls(**values)
