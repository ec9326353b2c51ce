"""The weighted cross entropy against NumPy, whole, in chunks and on meshes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mono_jax.parallel.mesh import BATCH, make_mesh, on_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training.loss import weighted_cross_entropy

RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.normal(size=(2, 6, 8)).astype(np.float32), RNG.normal(size=(8, 11)).astype(np.float32)
TARGETS, WEIGHTS = RNG.integers(0, 11, (2, 6)).astype(np.int32), RNG.random((2, 6)).astype(np.float32)
WEIGHTS[0, 2] = WEIGHTS[1, 5] = 0
CHUNKS = (0, 1, 4, 5, 6, 7)  # of 6 slots a row


def loss_sum(hidden: Any, kernel: Any, targets: Any, weights: Any, chunk: int = 0) -> jax.Array:
    return weighted_cross_entropy(hidden, kernel, targets, weights, chunk=chunk).sum()


def expected() -> tuple[float, np.ndarray]:
    """The loss and its gradient by ``HIDDEN``."""
    logits = np.float64(HIDDEN) @ np.float64(KERNEL)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hits = np.eye(11)[TARGETS]
    loss = -(WEIGHTS * np.log((shares * hits).sum(-1))).sum()
    return loss, (WEIGHTS[..., None] * (shares - hits)) @ np.float64(KERNEL).T


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradient_are_those_of_the_formula(chunk: int):
    loss, gradient = jax.value_and_grad(loss_sum)(HIDDEN, KERNEL, TARGETS, WEIGHTS, chunk=chunk)
    np.testing.assert_allclose(loss, expected()[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected()[1], atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_stands_in_an_unused_slot_does_not_matter(chunk: int, poison: float):
    hidden = HIDDEN.copy()
    hidden[0, 2] = hidden[1, 5, 3] = poison
    targets = TARGETS.copy()
    targets[1, 5] = -1
    found, gradients = jax.value_and_grad(loss_sum, argnums=(0, 1))(hidden, KERNEL, targets, WEIGHTS, chunk=chunk)
    np.testing.assert_allclose(found, expected()[0], rtol=1e-5)
    clean = jax.grad(loss_sum, argnums=(0, 1))(HIDDEN, KERNEL, TARGETS, WEIGHTS, chunk=chunk)
    for one, other in zip(gradients, clean):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_chunks_change_no_bit_of_the_loss(dtype: Any):
    args = HIDDEN.astype(dtype), KERNEL, TARGETS, WEIGHTS
    losses = {float(jax.jit(loss_sum, static_argnames="chunk")(*args, chunk=n)) for n in CHUNKS}
    assert max(losses) - min(losses) <= 1e-7 * max(losses)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (1, 2, 3), (1, 2, 2, 2)])
def test_a_mesh_changes_neither_loss_nor_gradients(axes: tuple[int, ...], chunk: int):
    """With 11 tokens and 8 devices, most devices have padding columns."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: math.prod(axes)])
    places = tuple(NamedSharding(mesh, spec) for spec in (BATCH, P(), BATCH, BATCH))
    inputs = [np.concatenate([a] * 4) for a in (HIDDEN, TARGETS, WEIGHTS)]
    args = jax.device_put((inputs[0], KERNEL, *inputs[1:]), places)
    function = jax.value_and_grad(partial(loss_sum, chunk=chunk), argnums=(0, 1))
    loss, gradients = jax.jit(on_mesh(function, mesh))(*args)
    one, expected_gradients = function(inputs[0], KERNEL, *inputs[1:])
    np.testing.assert_allclose(loss, one, rtol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_a_used_slot_does():
    hidden = HIDDEN.copy()
    hidden[0, 0, 0] = np.nan
    assert np.isnan(loss_sum(hidden, KERNEL, TARGETS, WEIGHTS))
