"""The weighted cross entropy against NumPy, whole and in chunks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mono_jax.training.loss import weighted_cross_entropy

RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.normal(size=(2, 6, 8)).astype(np.float32), RNG.normal(size=(8, 11)).astype(np.float32)
TARGETS, WEIGHTS = RNG.integers(0, 11, (2, 6)).astype(np.int32), RNG.random((2, 6)).astype(np.float32)
WEIGHTS[0, 2] = WEIGHTS[1, 5] = 0
CHUNKS = (0, 1, 5, 6, 11, 12, 13)  # of 12 slots


def expected() -> tuple[float, np.ndarray]:
    """The loss and its gradient by ``HIDDEN``."""
    logits = np.float64(HIDDEN) @ np.float64(KERNEL)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    hits = np.eye(11)[TARGETS]
    loss = -(WEIGHTS * np.log((shares * hits).sum(-1))).sum()
    return loss, (WEIGHTS[..., None] * (shares - hits)) @ np.float64(KERNEL).T


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradient_are_those_of_the_formula(chunk: int):
    loss, gradient = jax.value_and_grad(weighted_cross_entropy)(HIDDEN, KERNEL, TARGETS, WEIGHTS, chunk=chunk)
    np.testing.assert_allclose(loss, expected()[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected()[1], atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_stands_in_an_unused_slot_does_not_matter(chunk: int, poison: float):
    hidden = HIDDEN.copy()
    hidden[0, 2] = hidden[1, 5, 3] = poison
    targets = TARGETS.copy()
    targets[1, 5] = -1
    found = weighted_cross_entropy(hidden, KERNEL, targets, WEIGHTS, chunk=chunk)
    np.testing.assert_allclose(found, expected()[0], rtol=1e-5)


def test_a_used_slot_does():
    hidden = HIDDEN.copy()
    hidden[0, 0, 0] = np.nan
    assert np.isnan(weighted_cross_entropy(hidden, KERNEL, TARGETS, WEIGHTS))
