"""The small layers against their formulas in float64; inputs so small that epsilon matters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mono_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    Structure,
    SwiGLU,
    Transposed,
    product,
    scan_layers,
    stacked,
    swiglu,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 8)).astype(np.float32) * 0.05
EPS = 1e-3
SCALE, BIAS = RNG.normal(size=8).astype(np.float32), RNG.normal(size=8).astype(np.float32)


def made(build: Any, **params: Any) -> nnx.Module:
    return Structure(build).bind(params)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_rms_norm():
    norm = made(lambda rngs: RMSNorm(8, EPS, rngs=rngs), scale=SCALE)
    wide = np.float64(X)
    np.testing.assert_allclose(norm(X), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * SCALE, rtol=1e-5)
    assert norm(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm():
    norm = made(lambda rngs: LayerNorm(8, EPS, rngs=rngs), scale=SCALE, bias=BIAS)
    wide = np.float64(X + 1)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * SCALE + BIAS
    np.testing.assert_allclose(norm(X + 1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool):
    kernel = RNG.normal(size=(8, 5)).astype(np.float32)
    layer = made(lambda rngs: Linear(8, 5, bias=bias, rngs=rngs), kernel=kernel, **({"bias": BIAS[:5]} if bias else {}))
    np.testing.assert_allclose(layer(X), X @ kernel + (BIAS[:5] if bias else 0), atol=1e-6)


def test_embedding():
    rows = RNG.normal(size=(11, 4)).astype(np.float32)
    layer = made(lambda rngs: Embedding(11, 4, rngs=rngs), embedding=rows)
    np.testing.assert_array_equal(layer(np.array([[10, 0], [3, 3]]), jnp.float32), rows[[[10, 0], [3, 3]]])


def test_swiglu_and_its_own_backward_pass():
    gate, up, dy = RNG.normal(size=(3, 5, 4)).astype(np.float32) * 2
    y, backward = jax.vjp(swiglu, gate, up)
    np.testing.assert_allclose(y, silu(np.float64(gate)) * up, rtol=1e-5)
    plain = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)[1](dy)
    for found, expected in zip(backward(dy), plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    kernels = {name: {"kernel": RNG.normal(size=shape).astype(np.float32)} for name, shape in SHAPES.items()}
    layer = made(lambda rngs: SwiGLU(8, 6, rngs=rngs), **kernels)
    gate, up, down = (np.float64(kernels[name]["kernel"]) for name in SHAPES)
    np.testing.assert_allclose(layer(X), (silu(X @ gate) * (X @ up)) @ down, atol=1e-5)


SHAPES = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_only_the_first_layers_are_run_one_after_another(count: int):
    layers = stacked(lambda rngs: Linear(8, 8, rngs=rngs), 3, nnx.Rngs(0))
    kernels = np.asarray(layers.kernel[...])
    assert kernels.shape == (3, 8, 8) and 0.015 < kernels.std() < 0.025
    assert not np.allclose(kernels[0], kernels[1])
    expected = X
    for kernel in kernels[:count]:
        expected = expected @ kernel
    np.testing.assert_allclose(scan_layers(layers, X, count, lambda body: body), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 2, Transposed.FEW_ROWS, Transposed.FEW_ROWS + 1])
def test_a_transposed_kernel_is_the_same_kernel(rows: int) -> None:
    """With few rows and with many; with leading axes, in another dtype, and through a layer with a bias."""
    kernel = RNG.normal(size=(2, 8, 24)).astype(np.float32)
    x = RNG.normal(size=(rows, 1, 8)).astype(np.float32)
    transposed = Transposed(jnp.asarray(kernel.swapaxes(1, 2)))
    assert transposed.shape == kernel.shape and transposed[1:].shape == (1, 8, 24)
    np.testing.assert_array_equal(transposed.matrix, kernel)
    expected = x.astype(np.float64) @ kernel[1].astype(np.float64)
    np.testing.assert_allclose(jax.jit(product)(x, transposed[1]), expected, atol=1e-5)
    bias = RNG.normal(size=24).astype(np.float32)
    layer = made(lambda rngs: Linear(8, 24, bias=True, rngs=rngs), kernel=transposed[1], bias=bias)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected + bias, atol=1e-5)
    narrow = transposed[1].astype(jnp.bfloat16)
    wide = narrow.times(jnp.asarray(x, jnp.bfloat16), jnp.float32)
    assert wide.dtype == jnp.float32 and narrow.times(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    exact = np.asarray(x, jnp.bfloat16).astype(np.float64) @ np.asarray(narrow.matrix).astype(np.float64)
    np.testing.assert_allclose(wide, exact, atol=1e-5)
