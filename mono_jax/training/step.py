"""The training state and the one training step.

Trainer, ahead-of-time compilation, benchmarks and tests all call the step made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.transformer import Model
from mono_jax.parallel.sharding import BATCH, like_params, param_shardings, tracing_for
from mono_jax.training.loss import weighted_cross_entropy
from mono_jax.training.optim import Optimizer
from mono_jax.training.stages import Stage, split

State = dict[str, Any]
Metrics = dict[str, jax.Array]
Step = Callable[[State, tree.Tree, Mapping[str, jax.Array]], tuple[State, Metrics]]


def init_state(
    stage: Stage, model: Model, optimizer: Optimizer, params: tree.Tree, frozen_dtype: jnp.dtype = jnp.bfloat16
) -> tuple[State, tree.Tree]:
    """(state, frozen) at step 0.

    state: {"step": int32, "trainable": float32 masters, "opt_state", "bad_steps": int32, updates in a row
    that were skipped as not finite, "skipped": int32, all such}. frozen: cast to ``frozen_dtype``.
    """
    trainable, frozen = split(stage, model.config, params)
    # A copy: the step donates its state, and must not take the caller's arrays with it.
    trainable = jax.tree.map(lambda a: jnp.array(a, jnp.float32), trainable)
    frozen = jax.tree.map(lambda a: jnp.asarray(a, frozen_dtype), frozen)
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "bad_steps", "skipped")}
    return {**counters, "trainable": trainable, "opt_state": optimizer.transform.init(trainable)}, frozen


def state_shardings(model: Model, state: State, frozen: tree.Tree, mesh: Mesh) -> tuple[State, tree.Tree]:
    """NamedShardings in the shapes of ``state`` and ``frozen`` (arrays or their shapes)."""
    params = param_shardings(model.config, tree.merge(state["trainable"], frozen), mesh)
    trainable = _like(params, state["trainable"])
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = dict.fromkeys(("step", "bad_steps", "skipped"), replicated)
    shardings |= {"trainable": trainable, "opt_state": like_params(state["opt_state"], trainable, mesh)}
    return shardings, _like(params, frozen)


def abstract_state(
    stage: Stage, model: Model, optimizer: Optimizer, mesh: Mesh, frozen_dtype: jnp.dtype = jnp.bfloat16
) -> tuple[State, tree.Tree]:
    """Shapes, dtypes and shardings of what ``init_state`` returns."""
    init = partial(init_state, stage, model, optimizer, frozen_dtype=frozen_dtype)
    state, frozen = jax.eval_shape(init, model.abstract_params())
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (state, frozen),
        state_shardings(model, state, frozen, mesh),
    )


def _like(full: tree.Tree, part: tree.Tree) -> tree.Tree:
    flat = tree.flatten(full)
    return tree.unflatten({path: flat[path] for path in tree.flatten(part)})


def all_params(state: State, frozen: tree.Tree) -> tree.Tree:
    """Every parameter of the model: trained masters and frozen ones."""
    return tree.merge(state["trainable"], frozen)


def _compute_copy(trainable: tree.Tree, dtype: jnp.dtype) -> tree.Tree:
    """Matrices in the compute dtype, cast once outside the scan; vectors stay float32 (they are cast at use)."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, trainable)


def loss_sum(
    model: Model, trainable: tree.Tree, frozen: tree.Tree, batch: Mapping[str, jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Sum of the weighted token losses of ``batch``, float32 scalar."""
    params = tree.merge(_compute_copy(trainable, dtype), frozen)
    hidden = model(params, batch, dtype).hidden
    kernel = model.output_kernel(params)
    chunk = model.config.loss_chunk
    return weighted_cross_entropy(hidden, kernel, batch["targets"], batch["loss_weights"], chunk=chunk)


def make_train_step(
    model: Model, optimizer: Optimizer, *, dtype: jnp.dtype = jnp.bfloat16, accumulate: int = 1
) -> Step:
    """The step (state, frozen, batch) -> (state, metrics), not yet jitted.

    The loss is sum(weight * token loss) / sum(weight) over the whole batch, however many pieces
    ``accumulate`` cuts it into. An update whose loss or gradient is not finite is skipped and counted.

    Metrics (scalars): loss, grad_norm (before clipping, trainable parameters only), weight (sum of loss
    weights), bad (1 = skipped), bad_steps (in a row), skipped (all), lr/GROUP.
    """

    def gradients(trainable: tree.Tree, frozen: tree.Tree, batch: Any, weight: jax.Array) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda t: loss_sum(model, t, frozen, batch, dtype) / weight)(trainable)

    def accumulated(trainable: tree.Tree, frozen: tree.Tree, batch: Any, weight: jax.Array) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return gradients(trainable, frozen, batch, weight)
        rows = batch["tokens"].shape[0]
        if rows % accumulate:
            raise ConfigError(f"accumulate {accumulate} does not divide the {rows} rows of a batch")
        # Rows i, i + A, ... form piece i: each device keeps its own rows.
        pieces = jax.tree.map(lambda a: a.reshape(rows // accumulate, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)

        def body(total: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(trainable, frozen, piece, weight)), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
        return jax.lax.scan(body, zeros, pieces)[0]

    def train_step(state: State, frozen: tree.Tree, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        trainable, opt_state = state["trainable"], state["opt_state"]
        weight = jnp.sum(batch["loss_weights"])
        loss, grads = accumulated(trainable, frozen, batch, jnp.maximum(weight, 1e-9))
        grad_norm = optax.tree.norm(grads)
        updates, new_opt_state = optimizer.transform.update(grads, opt_state, trainable)
        new_trainable = optax.apply_updates(trainable, updates)

        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)  # noqa: E731
        new_state = {
            "step": state["step"] + 1,
            "bad_steps": jnp.where(bad, state["bad_steps"] + 1, 0),
            "skipped": state["skipped"] + bad,
            "trainable": keep(new_trainable, trainable),
            "opt_state": keep(new_opt_state, opt_state),
        }
        metrics = {"loss": loss, "grad_norm": grad_norm, "weight": weight, "bad": bad.astype(jnp.int32)}
        metrics |= {name: new_state[name] for name in ("bad_steps", "skipped")}
        metrics |= {f"lr/{group}": schedule(state["step"]) for group, schedule in optimizer.schedules.items()}
        return new_state, metrics

    return train_step


def jit_train_step(step: Step, model: Model, state: State, frozen: tree.Tree, mesh: Mesh) -> Step:
    """``step`` compiled for ``mesh``, its state donated. ``state`` and ``frozen``: arrays or their shapes."""
    shardings, frozen_shardings = state_shardings(model, state, frozen, mesh)
    batch = NamedSharding(mesh, BATCH)

    def on_mesh(*args: Any) -> tuple[State, Metrics]:
        with tracing_for(mesh):
            return step(*args)

    return jax.jit(
        on_mesh,
        donate_argnums=0,
        in_shardings=(shardings, frozen_shardings, batch),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
