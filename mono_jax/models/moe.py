"""Multimodal mixture of experts with static routing (Mono-InternVL, eq. 4-5).

Slots are modality-major: of x [B, S, d], the first slots of each row, or of each part of it, are visual. If the
boundary is the same for all rows and known at compile time, each expert is a dense layer on its own slots.
*Ragged* boundaries differ from row to row and are an array; the grouped kernels of ``pallas_kernels`` take the expert
of each block of slots, so that again no slot is computed twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mono_jax.axes import CONTEXT, ROWS, TENSOR
from mono_jax.errors import ConfigError
from mono_jax.models.execution import Execution
from mono_jax.models.layers import GeGLU, Linear, SwiGLU
from mono_jax.models.slots import Slots
from pallas_kernels.experts.block_map import VISUAL
from pallas_kernels.experts.contract import FfnWeights
from pallas_kernels.experts.mesh import sharded_ffn, sharded_matmul


def by_modality(
    text: Linear | SwiGLU, visual: Linear | SwiGLU | None, x: jax.Array, slots: Slots, execution: Execution
) -> jax.Array:
    """Applies ``visual`` to the visual slots of x [B, S, d] and ``text`` to the rest.

    Without a visual expert every slot takes ``text``. ``execution.experts`` chooses the form: "static", "grouped", or
    "dense_both", which runs both experts on all slots and selects by mask (the naive form of the papers; the
    oracle of the tests). Raises ConfigError for "static" with ragged boundaries.
    """
    if visual is None or slots.all_text:
        return text(x)
    if execution.experts == "dense_both":
        return jnp.where(slots.is_visual()[..., None], visual(x), text(x))
    if execution.experts == "grouped":
        return _grouped(text, visual, x, slots, execution)
    if slots.boundaries is not None:
        raise ConfigError("execution.experts 'static' cannot serve rows with different boundaries: use 'grouped'")
    if slots.visual == x.shape[1]:
        return visual(x)
    of_visual, of_text = slots.apart(x)
    return slots.together(visual(of_visual), text(of_text))


def _grouped(
    text: Linear | SwiGLU, visual: Linear | SwiGLU, x: jax.Array, slots: Slots, execution: Execution
) -> jax.Array:
    """The rows of x in one grouped call per device; blocks do not straddle a boundary, so nothing is permuted."""
    rows, length, _ = x.shape
    block, parts = execution.experts_block, slots.parts
    if length % (parts * block) or (slots.boundaries is None and slots.visual % (parts * block)):
        each = f", shared by mesh.context {parts}" if parts > 1 else ""
        raise ConfigError(
            f"execution.experts 'grouped' needs rows of whole blocks: {length} slots, {slots.visual} of them visual"
            f"{each}, execution.experts_block {block}: change data.visual_tokens and data.text_tokens, or the block"
        )
    # The first slot of a block determines the expert for the whole block; TEXT and VISUAL are 0 and 1.
    experts = jnp.broadcast_to(slots.is_visual()[:, ::block], (rows, length // block)).astype(jnp.int32)
    if text.is_transposed:
        return _block_by_block(text, visual, x, experts, block)
    kernel = None if execution.experts_kernel == "auto" else execution.experts_kernel
    options = {"rows": ROWS, "slots": CONTEXT, "block": block, "implementation": kernel}
    if isinstance(text, SwiGLU):
        weights = _ffn_weights(text, x.dtype), _ffn_weights(visual, x.dtype)
        if not isinstance(text, GeGLU):
            return sharded_ffn(x, experts, *weights, columns=TENSOR, **options)
        # The kernels fuse SwiGLU only: this is three grouped matmuls.
        gates, ups, downs = zip(*weights)
        gate, up = (sharded_matmul(x, experts, *kernels, columns=TENSOR, **options) for kernels in (gates, ups))
        return sharded_matmul(text.gated(gate, up), experts, *downs, sums=TENSOR, **options)
    kernels = (text.weight(x.dtype), visual.weight(x.dtype))
    y = sharded_matmul(x, experts, *kernels, columns=TENSOR, **options)
    if hasattr(text, "bias"):
        y += jnp.where(slots.is_visual()[..., None], visual.bias[...], text.bias[...]).astype(y.dtype)
    return y


def _block_by_block(
    text: Linear | SwiGLU, visual: Linear | SwiGLU, x: jax.Array, experts: jax.Array, block: int
) -> jax.Array:
    """Picks each block's expert by a branch: transposing kernels for the grouped form would copy them at every call."""

    def one(of_block: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, slots = of_block
        return jax.lax.cond(expert == VISUAL, visual, text, slots)

    y = jax.lax.map(one, (experts.reshape(-1), x.reshape(-1, block, x.shape[-1])))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _ffn_weights(expert: SwiGLU, dtype: jnp.dtype) -> FfnWeights:
    return FfnWeights(*(part.weight(dtype) for part in (expert.gate, expert.up, expert.down)))
