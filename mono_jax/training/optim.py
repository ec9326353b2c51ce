"""Optimizers and schedules of optax, one per parameter group through ``optax.multi_transform``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import canonical
from mono_jax.training.groups import groups_of, split
from mono_jax.training.optim_config import GroupConfig, OptimConfig
from mono_jax.training.stages import Schedule, Stage

DECAYED = ("kernel", "embedding", "position_embedding", "class_embedding")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """``transform``: for the trainable tree; ``schedules``: {group: step -> learning rate}."""

    transform: optax.GradientTransformation
    schedules: dict[str, Callable[[jax.Array], jax.Array]]


def make_schedule(
    peak: float, kind: Schedule, warmup_steps: int, steps: int, *, end: float = 0.0, decay: float = 0.1
) -> optax.Schedule:
    """Learning rate by step; see ``OptimConfig`` for the kinds."""
    low, rest = end * peak, max(steps - warmup_steps, 1)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=end)
    elif kind == "linear":
        after = optax.linear_schedule(peak, low, rest)
    elif kind == "wsd":
        falling = min(max(round(decay * steps), 1), rest)
        falls = optax.linear_schedule(peak, low, falling)
        after = optax.join_schedules([optax.constant_schedule(peak), falls], [rest - falling])
    else:
        after = optax.constant_schedule(peak)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def make_optimizer(
    stage: Stage, model: Architecture, params: Mapping[str, Any], steps: int, config: OptimConfig | None = None
) -> Optimizer:
    """The optimizer of ``stage`` for the trainable part of ``params`` (arrays or their shapes).

    Frozen parameters are not in its tree at all, so they have no state, do not count in the clipping norm, and cannot
    be changed by weight decay. Raises ConfigError if ``steps`` < 1 or a group named in the config does not train.
    """
    config = config or OptimConfig()
    if steps < 1:
        raise ConfigError(f"steps is {steps}: it must be at least 1")
    trainable, _ = split(stage, model, params)
    groups = groups_of(model, params)
    labels = {path: groups[canonical(path)] for path in tree.flatten(trainable)}
    trained = sorted(set(labels.values()))
    if idle := sorted(set(config.groups) - set(trained)):
        raise ConfigError(f"optim.groups names {idle}, which stage {stage.name} does not train (it trains {trained})")
    warmup = stage.warmup if config.warmup is None else config.warmup
    warmup_steps = round(warmup * steps) if config.warmup_steps is None else config.warmup_steps
    schedules, transforms = {}, {}
    for group in trained:
        own = config.groups.get(group, GroupConfig())
        peak = _first(own.learning_rate, config.learning_rate, stage.learning_rate)
        kind = own.schedule or config.schedule or stage.schedule
        schedules[group] = make_schedule(peak, kind, warmup_steps, steps, end=config.end, decay=config.decay)
        weight_decay = _first(own.weight_decay, config.weight_decay, stage.weight_decay)
        transforms[group] = _transform(own.optimizer or config.optimizer, schedules[group], weight_decay, config)
    # The identity keeps the state's structure, so that a resumed run may turn clipping on or off.
    clipping = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return Optimizer(optax.chain(clipping, optax.multi_transform(transforms, tree.unflatten(labels))), schedules)


def _first(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _transform(
    name: str, schedule: optax.Schedule, weight_decay: float, config: OptimConfig
) -> optax.GradientTransformation:
    moments = {key: value for key in ("b1", "b2") if (value := getattr(config, key)) is not None}
    if name == "adamw":
        return optax.adamw(schedule, **moments, eps=config.eps, weight_decay=weight_decay, mask=_decay_mask)
    if name == "lion":
        return optax.lion(schedule, **moments, weight_decay=weight_decay, mask=_decay_mask)
    if name == "adafactor":
        direction = optax.adafactor(None, multiply_by_parameter_scale=False)
    else:
        direction = optax.contrib.muon(
            1.0,
            consistent_rms=0.2,  # updates as large as AdamW's, so that learning rates carry over (arXiv 2502.16982)
            muon_weight_dimension_numbers=_muon_dimensions,
            **{f"adam_{key}": value for key, value in moments.items()},
        )
    # Weight decay as in AdamW: scaled by the learning rate, and only where the mask is True. The direction points
    # downhill.
    decayed = optax.add_decayed_weights(-weight_decay, mask=_decay_mask)
    return optax.chain(direction, decayed, optax.scale_by_schedule(schedule))


def _decay_mask(params: Any) -> Any:
    """True for kernels and embeddings, False for scales and biases (by name, since stacking hides their rank)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def _muon_dimensions(params: Any) -> Any:
    """Input and output axes of the kernels of decoder layers [L, in, out]; None = left to AdamW."""

    def dimensions(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        if path[-1].key != "kernel" or not str(path[0].key).startswith("layers"):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)
