"""Next-token cross entropy on the text slots, computed separately on each device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mono_jax.axes import CONTEXT, ROWS, SHARDS, TENSOR
from pallas_kernels.devices import Axes, per_device, split_mesh
from pallas_kernels.precision import float32_sums

# Two lane tiles of a TPU, divisible by any usual size of the tensor axis. XLA:TPU does not reduce-scatter bfloat16
# gradients with an odd number of columns, so each device would hold all of them.
VOCABULARY_MULTIPLE = 256


def weighted_cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int = 0, wide: bool = False
) -> jax.Array:
    """Cross entropy of each slot times its weight, float32 [B, T].

    Args:
      hidden: [B, T, d], after the final norm.
      kernel: [d, vocabulary], the LM head.
      targets: int32 [B, T], ids of the next tokens.
      weights: float32 [B, T], 0 = not trained on.
      chunk, wide: as for ``token_cross_entropy``.
    """
    # Before the product, because the content of an unused slot, even a NaN, must reach neither the loss nor a gradient.
    hidden = jnp.where((weights > 0)[..., None], hidden, 0)
    losses = token_cross_entropy(hidden, kernel, targets, chunk=chunk, wide=wide)
    # where, not just a product: 0 * inf is NaN.
    return jnp.where(weights > 0, weights * losses, 0.0)


def token_cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int = 0, wide: bool = False
) -> jax.Array:
    """Cross entropy of each slot, float32 [B, T].

    On a mesh, each device gathers the kernel along d once, then works on its own slots; the columns of the kernel,
    padded to be divisible, are split over the tensor axis, so that no device holds the full logits. If left to the
    partitioner, every chunk would reduce partial logits of all rows.

    Args:
      hidden: [B, T, d], after the final norm.
      kernel: [d, vocabulary], the LM head.
      targets: int32 [B, T], ids of the next tokens.
      chunk: how many of a device's slots per row have their logits in memory at once (recomputed in the backward pass);
        0 = all. With a vocabulary of 92,553, the float32 logits of 4,096 slots take 1.5 GB.
      wide: devices reduce the kernel's gradient in float32, whatever its dtype.
    """
    axes = {} if (mesh := split_mesh()) is None else dict(mesh.shape)
    d, vocabulary = kernel.shape
    kernel = kernel.astype(hidden.dtype)
    present = tuple(axis for axis in SHARDS if axes.get(axis, 1) > 1)
    shards = present if d % math.prod(axes[axis] for axis in present) == 0 else ()
    tensor = TENSOR if axes.get(TENSOR, 1) > 1 else None
    if shards or tensor:  # stored weights and the optimizer never see these columns: their gradient is sliced off
        multiple = math.lcm(VOCABULARY_MULTIPLE, axes.get(TENSOR, 1))
        kernel = jnp.pad(kernel, ((0, 0), (0, -vocabulary % multiple)))

    if wide:  # sums over devices have the dtype of the inputs of `per_device`
        kernel = kernel.astype(jnp.float32)

    def of_own_slots(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        kernel = _gathered(hidden.dtype, shards, kernel) if shards else kernel.astype(hidden.dtype)
        return _in_chunks(partial(_losses, kernel, vocabulary, tensor), chunk, hidden, targets)

    own = PartitionSpec(ROWS, CONTEXT)
    return per_device(of_own_slots, (own, PartitionSpec(shards, tensor), own), own)(hidden, kernel, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(dtype: jnp.dtype, axes: Axes, kernel: jax.Array) -> jax.Array:
    """The rows of all devices, sent in ``dtype``; gradients are reduce-scattered in the kernel's dtype."""
    return jax.lax.all_gather(kernel.astype(dtype), axes, axis=0, tiled=True)


def _gathered_fwd(dtype: jnp.dtype, axes: Axes, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gathered(dtype, axes, kernel), jnp.zeros((), kernel.dtype)


def _gathered_bwd(dtype: jnp.dtype, axes: Axes, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(gradient.astype(like.dtype), axes, scatter_dimension=0, tiled=True),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def _losses(kernel: jax.Array, vocabulary: int, tensor: str | None, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [B, T] of hidden [B, T, d]; with ``tensor``, this device has only part of the kernel's columns."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # faster on CPUs than a product with [B, T, d]
    logits = float32_sums("nd,dv->nv", flat, kernel)
    logits = logits.reshape(*targets.shape, -1)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    if tensor:
        column += jax.lax.axis_index(tensor) * logits.shape[-1]
    if tensor or logits.shape[-1] > vocabulary:
        logits = jnp.where(column < vocabulary, logits, -jnp.inf)
    # A mask instead of a gather: its gradient is elementwise, not a scatter.
    at_target = jnp.sum(jnp.where(column == targets[..., None], logits, 0.0), axis=-1)
    if not tensor:
        return jax.nn.logsumexp(logits, axis=-1) - at_target
    largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), tensor)
    total, at_target = jax.lax.psum((jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), at_target), tensor)
    return jnp.log(total) + largest - at_target


def _in_chunks(losses: Callable[..., jax.Array], chunk: int, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """``losses``, for ``chunk`` slots of all rows at a time."""
    rows, slots = targets.shape
    if not chunk or slots <= chunk:
        return losses(hidden, targets)

    def chunks(a: jax.Array) -> jax.Array:
        """[B, T, ...] as [T / chunk, B, chunk, ...]."""
        filled = jnp.pad(a, ((0, 0), (0, -slots % chunk), *((0, 0),) * (a.ndim - 2)))
        return filled.reshape(rows, -1, chunk, *a.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(jax.checkpoint(lambda block: losses(*block)), (chunks(hidden), chunks(targets)))
    return found.swapaxes(0, 1).reshape(rows, -1)[:, :slots]
