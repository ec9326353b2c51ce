"""The one training step: trainer, ahead-of-time compilation, benchmarks and tests all call the step made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import BATCH, on_mesh
from mono_jax.training.loss import weighted_cross_entropy
from mono_jax.training.norms import GroupNorms, named
from mono_jax.training.optim import Optimizer
from mono_jax.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, tree.Tree, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


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
    chunk = model.execution.loss_chunk
    return weighted_cross_entropy(hidden, kernel, batch["targets"], batch["loss_weights"], chunk=chunk)


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    *,
    dtype: jnp.dtype = jnp.bfloat16,
    grad_accum_steps: int = 1,
    norms_every: int = 0,
) -> Step:
    """The step (state, frozen, batch) -> (state, metrics), not yet jitted.

    The loss is sum(weight * token loss) / sum(weight) over the whole batch, however many microbatches
    ``grad_accum_steps`` cuts it into. An update whose loss, gradient or result is not finite is skipped and counted; a
    batch without a trained token updates nothing. The learning rate follows ``state.step`` in any case.

    Metrics (scalars): loss, grad_norm (before clipping, trainable parameters only), weight (sum of loss
    weights), nonfinite (1 = skipped), nonfinite_steps (in a row), skipped (all), lr/GROUP. With ``norms_every`` also
    grad_norm/GROUP and, in steps that it divides (NOT_COMPUTED in others), update_norm/GROUP and param_norm/GROUP.
    """
    group_norms = GroupNorms(model.config, model.abstract_params()) if norms_every else None

    def train_step(state: TrainState, frozen: tree.Tree, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        weight = jnp.sum(batch["loss_weights"])
        loss, grads = _gradients(model, state.trainable, frozen, batch, weight, dtype, grad_accum_steps)
        norms = named("grad_norm", group_norms(grads)) if group_norms else {}
        grad_norm = optax.tree.norm(list(norms.values()) if norms else grads)
        opt_state = at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.transform.update(grads, opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        if group_norms:
            norms |= group_norms.of_step(state.trainable, trainable, (state.step + 1) % norms_every == 0)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        finite &= jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trainable)]).all()
        take = finite & (weight > 0)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)  # noqa: E731
        new_state = TrainState(
            step=state.step + 1,
            nonfinite_steps=jnp.where(finite, 0, state.nonfinite_steps + 1),
            skipped=state.skipped + ~finite,
            trainable=keep(trainable, state.trainable),
            opt_state=keep(opt_state, state.opt_state),
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "weight": weight, "nonfinite": (~finite).astype(jnp.int32)}
        metrics |= {"nonfinite_steps": new_state.nonfinite_steps, "skipped": new_state.skipped}
        metrics |= {f"lr/{group}": schedule(state.step) for group, schedule in optimizer.schedules.items()}
        return new_state, metrics | norms

    return train_step


def at_step(opt_state: Any, step: jax.Array) -> Any:
    """``opt_state`` with the schedules' own counters set to ``step``: skipped updates do not hold the rate back.

    The counters of moments are left alone: they count updates.
    """

    def is_schedule(path: Any, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    return optax.tree.set(opt_state, is_schedule, count=step)


def _gradients(
    model: Model,
    trainable: tree.Tree,
    frozen: tree.Tree,
    batch: Mapping[str, jax.Array],
    weight: jax.Array,
    dtype: jnp.dtype,
    grad_accum_steps: int,
) -> tuple[jax.Array, tree.Tree]:
    """Loss and gradients of ``trainable`` over the batch, one microbatch after another."""
    weight = jnp.maximum(weight, 1e-9)

    def gradients(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tree.Tree]:
        return jax.value_and_grad(lambda t: loss_sum(model, t, frozen, batch, dtype) / weight)(trainable)

    if grad_accum_steps == 1:
        return gradients(batch)
    rows = batch["tokens"].shape[0]
    if rows % grad_accum_steps:
        raise ConfigError(f"grad_accum_steps {grad_accum_steps} does not divide the {rows} rows of a batch")
    # Rows i, i + A, ... form microbatch i: each device keeps its own rows.
    shape = (rows // grad_accum_steps, grad_accum_steps)
    microbatches = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(microbatch)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(body, zeros, microbatches)[0]


def jit_train_step(step: Step, model: Model, state: TrainState, frozen: tree.Tree, mesh: Mesh) -> Step:
    """``step`` compiled for ``mesh``, its state donated. ``state`` and ``frozen``: arrays or their shapes."""
    shardings, frozen_shardings = state_shardings(model, state, frozen, mesh)
    return jax.jit(
        on_mesh(step, mesh),
        donate_argnums=0,
        in_shardings=(shardings, frozen_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
