"""The one training step, which training, ahead-of-time compilation, benchmarks and tests all use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import on_mesh
from mono_jax.training.compiler_options import compiler_options
from mono_jax.training.loss import weighted_cross_entropy
from mono_jax.training.norms import GroupNorms, named
from mono_jax.training.optim import Optimizer
from mono_jax.training.state import TrainState, state_shardings
from pallas_kernels.precision import library_products

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, tree.Tree, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


def _compute_copy(trainable: tree.Tree, dtype: jnp.dtype) -> tree.Tree:
    """Matrices in the compute dtype, cast once outside the scan; vectors stay float32 (they are cast at use)."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, trainable)


def slot_losses(
    model: Model, trainable: tree.Tree, frozen: tree.Tree, batch: Mapping[str, jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Loss of each text slot of ``batch``, times its weight, float32 [B, T]."""
    params = tree.merge(_compute_copy(trainable, dtype), frozen)
    hidden = model(params, batch, dtype).hidden
    kernel = model.output_kernel(params)
    options = {"chunk": model.execution.loss_chunk, "wide": model.execution.wide_gradients}
    return weighted_cross_entropy(hidden, kernel, batch["targets"], batch["loss_weights"], **options)


def loss_sum(
    model: Model, trainable: tree.Tree, frozen: tree.Tree, batch: Mapping[str, jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Sum of the weighted losses of ``batch``, float32 scalar."""
    return slot_losses(model, trainable, frozen, batch, dtype).sum()


def sums_by_source(losses: jax.Array, batch: Mapping[str, jax.Array], sources: Sequence[str]) -> Metrics:
    """loss_sum/NAME of the weighted ``losses`` [B, T] and weight/NAME for each of the sources; {} without sources."""
    if not sources:
        return {}
    number = jnp.arange(1, len(sources) + 1, dtype=jnp.int32)[:, None, None]
    values = jnp.stack([losses, batch["loss_weights"]])[:, None]  # [2, 1, B, T]
    sums = jnp.where(batch["sources"] == number, values, 0.0).sum((2, 3))
    kinds = ("loss_sum", "weight")
    return {f"{kind}/{name}": sums[k, n] for k, kind in enumerate(kinds) for n, name in enumerate(sources)}


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    *,
    dtype: jnp.dtype = jnp.bfloat16,
    grad_accum_steps: int = 1,
    norms_every: int = 0,
    sources: Sequence[str] = (),
) -> Step:
    """The step (state, frozen, batch) -> (state, metrics), not yet jitted.

    The loss is sum(weight * token loss) / sum(weight) over the whole batch, however many microbatches
    ``grad_accum_steps`` splits it into. An update whose loss, gradient or result is non-finite is skipped and counted;
    a batch without trained tokens updates nothing. The learning rate follows ``state.step`` in any case.

    Metrics (scalars): loss, grad_norm (before clipping, trainable parameters only), weight (sum of loss weights),
    nonfinite (1 = skipped), nonfinite_steps (consecutive), skipped (total), lr/GROUP. With ``norms_every`` also
    grad_norm/GROUP and, in steps that it divides (NOT_COMPUTED in others), update_norm/GROUP and param_norm/GROUP. With
    ``sources`` (names in the order of the batch's field "sources"), also those of ``sums_by_source``.
    """
    group_norms = GroupNorms(model.config, model.abstract_params()) if norms_every else None

    def train_step(state: TrainState, frozen: tree.Tree, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        weight = jnp.sum(batch["loss_weights"])
        objective = _objective(model, frozen, weight, dtype, sources)
        (loss, by_source), grads = _gradients(objective, state.trainable, batch, grad_accum_steps)
        norms = named("grad_norm", group_norms(grads)) if group_norms else {}
        grad_norm = optax.tree.norm(list(norms.values()) if norms else grads)
        opt_state = at_step(state.opt_state, state.step)
        with library_products(dtype):  # Muon's; with bfloat16 activations, the fastest precision will do
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
        return new_state, metrics | norms | by_source

    return model.execution.with_products(train_step)


def at_step(opt_state: Any, step: jax.Array) -> Any:
    """``opt_state`` with the schedules' own counters set to ``step``, so that skipped updates do not delay the
    schedule.

    The counters of the moments are left unchanged, since they count updates.
    """

    def is_schedule(path: Any, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    return optax.tree.set(opt_state, is_schedule, count=step)


Objective = Callable[[tree.Tree, Mapping[str, jax.Array]], tuple[jax.Array, Metrics]]


def _objective(
    model: Model, frozen: tree.Tree, weight: jax.Array, dtype: jnp.dtype, sources: Sequence[str]
) -> Objective:
    """Returns (trainable, batch or part of it) -> (its share of the loss, sums by source)."""
    weight = jnp.maximum(weight, 1e-9)

    def objective(trainable: tree.Tree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        losses = slot_losses(model, trainable, frozen, batch, dtype)
        return losses.sum() / weight, sums_by_source(losses, batch, sources)

    return objective


def _gradients(
    objective: Objective, trainable: tree.Tree, batch: Mapping[str, jax.Array], grad_accum_steps: int
) -> tuple[tuple[jax.Array, Metrics], tree.Tree]:
    """``objective`` over the batch and its gradient with respect to ``trainable``, one microbatch after another."""
    gradients = jax.value_and_grad(objective, has_aux=True)
    if grad_accum_steps == 1:
        return gradients(trainable, batch)
    rows = batch["tokens"].shape[0]
    if rows % grad_accum_steps:
        raise ConfigError(f"grad_accum_steps {grad_accum_steps} does not divide the {rows} rows of a batch")
    # Rows i, i + A, ... form microbatch i: each device keeps its own rows.
    shape = (rows // grad_accum_steps, grad_accum_steps)
    microbatches = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(trainable, microbatch)), None

    first = jax.tree.map(lambda a: a[0], microbatches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, trainable, first))
    return jax.lax.scan(body, zeros, microbatches)[0]


def jit_train_step(
    step: Step,
    model: Model,
    state: TrainState,
    frozen: tree.Tree,
    mesh: Mesh,
    options: Mapping[str, Any] | None = None,
) -> Step:
    """``step`` compiled for ``mesh``, with its state donated. ``state`` and ``frozen``: arrays or their shapes.

    ``options``: compiler options that override those of the device kind (``compiler_options``).
    """
    shardings, frozen_shardings = state_shardings(model, state, frozen, mesh)
    return jax.jit(
        on_mesh(step, mesh),
        donate_argnums=0,
        in_shardings=(shardings, frozen_shardings, None),  # a batch comes in the layout of ``parallel.rows``
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        compiler_options=compiler_options(mesh, options),
    )
