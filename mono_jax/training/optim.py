"""AdamW per parameter group through ``optax.multi_transform``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.architecture import ModelConfig
from mono_jax.training.stages import GROUPS, Schedule, Stage, groups_of, split

DECAYED = ("kernel", "embedding", "position_embedding", "class_embedding")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer; None = the stage's own.

    Attributes:
      learning_rate: peak. group_learning_rates: {group: peak} where a group differs.
      schedule: "constant" or "cosine", after ``warmup_steps`` (or ``warmup``, a fraction of all steps).
      weight_decay: decoupled, on kernels and embeddings. group_weight_decays: where a group differs.
      b1, b2, eps: of AdamW. clip_norm: global norm over the trainable gradients; 0 = no clipping.
      end: learning rate at the end of "cosine", as a fraction of the peak.
    """

    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup: float | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    end: float = 0.0
    group_learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    group_weight_decays: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.group_learning_rates, self.group_weight_decays):
            for group in table:
                if group not in GROUPS:
                    raise unknown_key("parameter group", group, GROUPS)
        if self.schedule not in (None, "constant", "cosine"):
            raise unknown_key("schedule", str(self.schedule), ("constant", "cosine"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimConfig:
        """Raises ConfigError that names the nearest valid key."""
        names = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise unknown_key("optim key", key, names)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """``transform``: on the trainable tree; ``schedules``: {group: step -> learning rate}."""

    transform: optax.GradientTransformation
    schedules: dict[str, Callable[[jax.Array], jax.Array]]


def make_schedule(peak: float, kind: Schedule, warmup_steps: int, steps: int, end: float = 0.0) -> optax.Schedule:
    """Linear warm-up from 0 over ``warmup_steps``, then constant, or a cosine down to ``end * peak`` at ``steps``."""
    if kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1), alpha=end)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def make_optimizer(
    stage: Stage, model: ModelConfig, params: Mapping[str, Any], steps: int, config: OptimConfig | None = None
) -> Optimizer:
    """The optimizer of ``stage`` for the trainable part of ``params`` (arrays or their shapes).

    Frozen parameters are not in its tree at all, so they have no state, take no part in the clipping norm,
    and weight decay cannot move them. Raises ConfigError if ``steps`` < 1 or a group named in the
    config does not train.
    """
    config = config or OptimConfig()
    if steps < 1:
        raise ConfigError(f"steps is {steps}: it must be at least 1")
    trainable, _ = split(stage, model, params)
    labels = {path: group for path, group in groups_of(model, params).items() if path in tree.flatten(trainable)}
    trained = sorted(set(labels.values()))
    for table in (config.group_learning_rates, config.group_weight_decays):
        if idle := sorted(set(table) - set(trained)):
            raise ConfigError(f"optim names {idle}, which stage {stage.name} does not train (it trains {trained})")

    warmup = stage.warmup if config.warmup is None else config.warmup
    warmup_steps = round(warmup * steps) if config.warmup_steps is None else config.warmup_steps
    default_rate = stage.learning_rate if config.learning_rate is None else config.learning_rate
    default_decay = stage.weight_decay if config.weight_decay is None else config.weight_decay
    kind = config.schedule or stage.schedule
    schedules, transforms = {}, {}
    for group in trained:
        peak = config.group_learning_rates.get(group, default_rate)
        schedules[group] = make_schedule(peak, kind, warmup_steps, steps, config.end)
        transforms[group] = optax.adamw(
            schedules[group],
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.group_weight_decays.get(group, default_decay),
            mask=_decay_mask,
        )
    transform = optax.multi_transform(transforms, tree.unflatten(labels))
    if config.clip_norm:
        transform = optax.chain(optax.clip_by_global_norm(config.clip_norm), transform)
    return Optimizer(transform, schedules)


def _decay_mask(params: Any) -> Any:
    """True for kernels and embeddings, False for scales and biases (stacking hides their rank, so by name)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
