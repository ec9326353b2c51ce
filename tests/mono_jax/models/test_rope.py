"""Rotary angles against the formulas in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.models.architecture import RopeScaling
from mono_jax.models.presets import preset
from mono_jax.models.rope import rotary, rotate

LIMIT = 8  # max_position_embeddings
POSITIONS = np.array([0, 1, 5, 6, 7, 40])


def rotary_of(scaling: RopeScaling | None, lengths: list[int]) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Cosines, sines, the dimension of a head and theta."""
    config = preset("tiny_mono", rope_scaling=scaling, max_position_embeddings=LIMIT, rope_theta=50.0)
    cosines, sines = rotary(config, jnp.asarray(POSITIONS), jnp.asarray(lengths))
    return np.asarray(cosines), np.asarray(sines), config.head_dim, config.rope_theta


def assert_angles(found: tuple[np.ndarray, np.ndarray, int, float], positions: np.ndarray, bases: list[float]) -> None:
    """Token by token: position / base ** (2 i / dim)."""
    cosines, sines, dim, _ = found
    exponents = np.arange(0, dim, 2) / dim
    for token, (position, base) in enumerate(zip(positions, bases, strict=True)):
        angles = position / np.float64(base) ** exponents
        np.testing.assert_allclose(cosines[token], np.cos(angles), atol=2e-5)
        np.testing.assert_allclose(sines[token], np.sin(angles), atol=2e-5)


def test_plain_angles():
    found = rotary_of(None, [99] * 6)
    assert found[0].dtype == found[1].dtype == np.float32 and found[0].shape == (6, found[2] // 2)
    assert_angles(found, POSITIONS, [50.0] * 6)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_linear_scaling_divides_positions(factor: float):
    assert_angles(rotary_of(RopeScaling("linear", factor), [99] * 6), POSITIONS / factor, [50.0] * 6)


def test_dynamic_scaling_sets_in_beyond_the_limit():
    """Each token uses the length of its own sample; a length equal to the limit changes nothing."""
    lengths = [3, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 5 * LIMIT]
    found = rotary_of(RopeScaling("dynamic", 2.0), lengths)
    growths = [1, 1, 1, 2 * 9 / 8 - 1, 3, 9]
    dim = found[2]
    assert_angles(found, POSITIONS, [50.0 * growth ** (dim / (dim - 2)) for growth in growths])


def test_rotation_turns_halves_against_each_other():
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    angles = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    found = rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)
    assert rotate(jnp.asarray(x, jnp.bfloat16), jnp.cos(angles), jnp.sin(angles)).dtype == jnp.bfloat16
