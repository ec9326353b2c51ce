"""Norms by parameter group, from the step on a mesh, against the same trees gathered and summed in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mono_jax import tree
from mono_jax.models.layer_ranges import canonical
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.rows import LocalRows
from mono_jax.training import step as train
from mono_jax.training.groups import groups_of, trained_groups
from mono_jax.training.norms import NOT_COMPUTED
from mono_jax.training.optim import make_optimizer
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.stages import get_stage
from mono_jax.training.state import init_state
from tests.mono_jax.helpers import random_batch

CONFIG = preset("tiny_mono")
RANGE = ("visual_experts[1:2]", "norms")


def by_group(values: tree.Tree) -> dict[str, float]:
    """Norms of a tree of NumPy arrays: optax's own over the leaves of each group, in float64."""
    groups = groups_of(CONFIG, Model(CONFIG).abstract_params())
    leaves: dict[str, list[np.ndarray]] = {}
    for path, leaf in tree.flatten(values).items():
        leaves.setdefault(groups[canonical(path)], []).append(leaf.astype(np.float64))
    with jax.enable_x64(True):
        return {group: float(optax.tree.norm([jnp.asarray(leaf) for leaf in found])) for group, found in leaves.items()}


@pytest.mark.parametrize(
    "trains",
    [pytest.param(get_stage("S1.1").trains, id="S1.1", marks=pytest.mark.slow), pytest.param(RANGE, id="a range")],
)
def test_norms_are_those_of_the_gathered_trees(trains: tuple[str, ...]):
    stage, model = dataclasses.replace(get_stage("S1.1"), trains=trains), Model(CONFIG)
    mesh, batch = make_mesh(MeshConfig(data=2, fsdp=4)), random_batch(8)
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(stage, CONFIG, params, 100, OptimConfig(learning_rate=1e-2, warmup=0.0))
    state, frozen = init_state(stage, model, optimizer, params, jnp.float32)
    before = jax.tree.map(np.array, state.trainable)

    def loss(trainable: tree.Tree) -> jax.Array:
        return train.loss_sum(model, trainable, frozen, batch, jnp.float32) / batch["loss_weights"].sum()

    gradient = jax.tree.map(np.array, jax.jit(jax.grad(loss))(state.trainable))
    step = train.make_train_step(model, optimizer, dtype=jnp.float32, norms_every=1)
    jitted = train.jit_train_step(step, model, state, frozen, mesh)
    state, metrics = jitted(state, frozen, LocalRows(mesh, 8).put(batch))
    after = jax.tree.map(np.array, state.trainable)

    expected = {"grad_norm": gradient, "param_norm": after, "update_norm": jax.tree.map(np.subtract, after, before)}
    found = {name: float(value) for name, value in metrics.items() if "_norm/" in name}
    assert {name.partition("/")[2] for name in found} == trained_groups(stage, CONFIG) == by_group(before).keys()
    for name, values in expected.items():
        for group, norm in by_group(values).items():
            assert found[f"{name}/{group}"] == pytest.approx(norm, rel=1e-5), (name, group)
    assert float(metrics["grad_norm"]) == pytest.approx(
        np.sqrt(sum(n**2 for n in by_group(gradient).values())), rel=1e-5
    )


def test_only_every_so_many_steps_have_norms_of_updates():
    stage, model, batch = get_stage("S1.1"), Model(CONFIG), random_batch(2)
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(stage, CONFIG, params, 100, OptimConfig(learning_rate=1e-2, warmup=0.0))
    state, frozen = init_state(stage, model, optimizer, params, jnp.float32)
    step = jax.jit(train.make_train_step(model, optimizer, dtype=jnp.float32, norms_every=2))
    for number in range(1, 5):
        state, metrics = step(state, frozen, batch)
        for kind in ("update_norm", "param_norm"):
            norm = float(metrics[f"{kind}/visual_experts"])
            assert norm > 0 if number % 2 == 0 else norm == NOT_COMPUTED
        assert float(metrics["grad_norm/visual_experts"]) > 0
    batch["loss_weights"][:] = np.inf
    assert np.isnan(step(state, frozen, batch)[1]["grad_norm/visual_experts"])
