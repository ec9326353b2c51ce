"""Float32 is float32, on every device: the precision of matrix products.

By default, XLA silently multiplies float32 matrices in TF32 on NVIDIA GPUs (10 bits of mantissa) and in one bfloat16
pass on TPUs (7 bits). Every product of this project passes ``product_precision`` of its operands instead, and products
inside libraries are traced in a ``library_products`` block (a test checks the sources for both). JAX's own setting
``jax_default_matmul_precision`` takes precedence where it is set: for a process (JAX_DEFAULT_MATMUL_PRECISION), or for
what is traced in a ``jax.default_matmul_precision(...)`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


def product_precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST if the product of ``operands`` is float32; None (JAX's setting) for other dtypes, or if it has been set.

    JAX's differentiation uses the same precision for the two products of the backward pass.
    """
    return _precision(jnp.result_type(*operands))


def library_products(dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """The same for products of ``dtype`` that a library traces inside the block."""
    highest = _precision(dtype) is not None
    return jax.default_matmul_precision("highest") if highest else contextlib.nullcontext()


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    unset = jax.config.jax_default_matmul_precision is None
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 and unset else None


def float32_sums(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum`` of two arrays of one dtype with a float32 result; its gradients are products in the operands' dtype.

    JAX's own gradient of such a product multiplies a float32 cotangent by bfloat16 operands, which NVIDIA GPUs do in
    TF32, at half the speed: on an H200 an FFN, forward and backward, took twice as long.
    """
    return _products(equation, a, b) if a.dtype == jnp.float32 else _with_narrow_gradients(equation, a, b)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which operands are differentiated; static, so that it shapes the backward program."""

    a: bool
    b: bool


def _products(equation: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=product_precision(a, b), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_narrow_gradients(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return _products(equation, a, b)


def _forward(equation: str, a, b) -> tuple[jax.Array, tuple[jax.Array, jax.Array, _Wanted]]:
    return _products(equation, a.value, b.value), (a.value, b.value, _Wanted(a.perturbed, b.perturbed))


def _backward(equation: str, saved: tuple[jax.Array, jax.Array, _Wanted], dy: jax.Array) -> tuple:
    a, b, wanted = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    dy = dy.astype(a.dtype)
    of_a = jax.linear_transpose(lambda a: _products(equation, a, b, a.dtype), a)
    of_b = jax.linear_transpose(lambda b: _products(equation, a, b, b.dtype), b)
    return of_a(dy)[0] if wanted.a else None, of_b(dy)[0] if wanted.b else None


_with_narrow_gradients.defvjp(_forward, _backward, symbolic_zeros=True)
