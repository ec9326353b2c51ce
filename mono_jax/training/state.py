"""The training state: what a step changes, and the frozen parameters that go with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.models.layer_ranges import joined
from mono_jax.models.transformer import Model
from mono_jax.parallel.specs import like_params, param_shardings
from mono_jax.training.groups import split
from mono_jax.training.optim import Optimizer
from mono_jax.training.stages import Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and returns; the frozen parameters are a separate argument, never returned.

    Attributes:
      step: int32, steps done.
      nonfinite_steps: int32, consecutive updates up to now that were skipped as non-finite.
      skipped: int32, total number of such updates.
      trainable: nested dict of float32 master weights.
      opt_state: of optax, over ``trainable``.
    """

    step: jax.Array
    nonfinite_steps: jax.Array
    skipped: jax.Array
    trainable: tree.Tree
    opt_state: Any

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)


def init_state(
    stage: Stage, model: Model, optimizer: Optimizer, params: tree.Tree, frozen_dtype: jnp.dtype | None = jnp.bfloat16
) -> tuple[TrainState, tree.Tree]:
    """(state, frozen) at step 0; frozen parameters are cast to ``frozen_dtype`` (None: unchanged)."""
    trainable, frozen = split(stage, model.config, params)
    # A copy, because the step donates its state and must not invalidate the caller's arrays.
    trainable = jax.tree.map(lambda a: jnp.array(a, jnp.float32), trainable)
    frozen = jax.tree.map(lambda a: jnp.asarray(a, frozen_dtype), frozen)
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731 (one buffer each: they are donated)
    return TrainState(zero(), zero(), zero(), trainable, optimizer.transform.init(trainable)), frozen


def state_shardings(model: Model, state: TrainState, frozen: tree.Tree, mesh: Mesh) -> tuple[TrainState, tree.Tree]:
    """NamedShardings in the shapes of ``state`` and ``frozen`` (arrays or their shapes)."""
    params = param_shardings(model.config, tree.merge(state.trainable, frozen), mesh)
    trainable = _like(params, state.trainable)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = like_params(state.opt_state, state.trainable, trainable, mesh)
    return TrainState(replicated, replicated, replicated, trainable, opt_state), _like(params, frozen)


def abstract_state(
    stage: Stage,
    model: Model,
    optimizer: Optimizer,
    mesh: Mesh,
    frozen_dtype: jnp.dtype | None = jnp.bfloat16,
    params: tree.Tree | None = None,
) -> tuple[TrainState, tree.Tree]:
    """Shapes, dtypes and shardings of what ``init_state`` returns for ``params`` (shapes; default: random weights)."""
    init = partial(init_state, stage, model, optimizer, frozen_dtype=frozen_dtype)
    state, frozen = jax.eval_shape(init, model.abstract_params() if params is None else params)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (state, frozen),
        state_shardings(model, state, frozen, mesh),
    )


def _like(full: tree.Tree, part: tree.Tree) -> tree.Tree:
    flat = tree.flatten(full)
    return tree.unflatten({path: flat[path] for path in tree.flatten(part)})


def all_params(state: TrainState, frozen: tree.Tree) -> Mapping[str, Any]:
    """All parameters of the model, with layers joined: trained masters and frozen parameters.

    A parameter with only some layers trained gets the dtype of the masters, which holds the frozen layers exactly.
    """
    return joined(tree.merge(state.trainable, frozen), concatenate)


def concatenate(pieces: list[jax.Array]) -> jax.Array:
    """The layers of ``pieces`` as one array, in the smallest dtype that holds them all."""
    dtype = jnp.result_type(*pieces)
    return jnp.concatenate([piece.astype(dtype) for piece in pieces])
