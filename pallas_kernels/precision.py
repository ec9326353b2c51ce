"""Float32 is float32, on every device: the precision of matrix products.

Left alone, XLA multiplies float32 matrices in TF32 on NVIDIA GPUs (10 bits of mantissa) and in one pass of bfloat16 on
TPUs (7 bits), in silence. Every product of this project says ``product_precision`` of its operands instead, and
products inside libraries stand in a block ``library_products`` (a test reads the sources for both). JAX's own setting
``jax_default_matmul_precision`` decides where somebody has set it: for a process (JAX_DEFAULT_MATMUL_PRECISION), or
for what is traced in a block ``jax.default_matmul_precision(...)``.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp


def product_precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST where ``operands`` make a float32 product, None (JAX's setting) for others and where a setting is made.

    JAX's differentiation gives the two products of the backward pass the same.
    """
    return _precision(jnp.result_type(*operands))


def library_products(dtype: jnp.dtype) -> contextlib.AbstractContextManager[None]:
    """The same for products of ``dtype`` that a library traces inside the block."""
    highest = _precision(dtype) is not None
    return jax.default_matmul_precision("highest") if highest else contextlib.nullcontext()


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    unset = jax.config.jax_default_matmul_precision is None
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 and unset else None
