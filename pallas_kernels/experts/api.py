"""Modality-grouped expert matmuls: ``modality_ffn`` and ``modality_matmul``, forward and backward, with one contract.

The contract, for callers
-------------------------
    block_map = make_block_map(mask, block=128)                    # once per batch, mask bool [N]
    xg = group_rows(x, block_map)                                  # [N, d] -> [M, d], one expert per block of rows
    yg = modality_ffn(xg, block_map.block_expert, text, visual, block=block_map.block)
    y = ungroup_rows(yg, block_map)                                # [M, d] -> [N, d]

or, in one call that lets an implementation gather on load, ``y = permuted_ffn(x, block_map, text, visual)``. Keeping
the whole residual stream grouped and permuting once per batch is cheaper still. ``unsorted_ffn`` is the variant of the
Mono-InternVL-1.5 paper (no permutation; a block with both modalities is computed twice and merged), for comparison.
``modality_matmul``, ``permuted_matmul`` and ``unsorted_matmul`` do the same for one matrix per expert.

x is bfloat16 or float32. Weights are ``FfnWeights(gate, up, down)`` in [in, out] layout, one per expert, never stacked.
They may have a different float dtype than x (float32 masters): they are rounded to x's dtype inside, and their
gradients are returned in their own dtype directly from the float32 sums. Rows of empty blocks (-1) are not read, and
their outputs are zero. Rows that pad a block must be zero or have a zero cotangent; otherwise they count in the weight
gradients (``group_rows`` and ``ungroup_rows`` take care of both).

Freezing needs no flag: an input that is not differentiated is not perturbed, and its gradient is never traced. That
holds under jit, scan, checkpoint and shard_map (tests count the matmuls of compiled programs). Each expert's weight
gradients are separate calls, so training one expert of two drops exactly the calls of the other.

The contract, for implementations
---------------------------------
Subclass ``contract.Implementation`` (its docstrings define shapes and dtypes) in a new module, as a frozen dataclass
whose fields are the tuning parameters, and register it by name in ``registry.IMPLEMENTATIONS``. Write
  - ``unsupported(problem)``: a reason, or None;
  - ``here()``: an instance that runs on this machine (interpreted if necessary), or raise ``Unavailable(reason)``;
  - the primitives ``matmul``, ``swiglu``, ``weight_gradient``, and, to fuse, ``swiglu_backward`` and ``swiglu_dx``.
The one custom_vjp (``vjp``) calls them; it decides what is computed, so primitives need not handle freezing.
Compilations for absent hardware go into ``checks.aot_table``.

The conformance suite (cases and oracle in ``checks.conformance``, tests in tests/pallas_kernels/kernel_suite.py) is
inherited by one test class per implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import device_key
from pallas_kernels.experts import vjp
from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL, BlockMap, group_rows, ungroup_rows
from pallas_kernels.experts.contract import FfnWeights, Implementation, Pair, Problem
from pallas_kernels.registry import resolve

# ======================================================================================================================
# Public functions
# ======================================================================================================================


def modality_matmul(
    x: jax.Array,
    block_expert: jax.Array,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    block: int = 128,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """Each row times the kernel of its own expert (the QKV of visual attention experts).

    Args:
      x: [M, d], grouped: every block of ``block`` rows has one expert.
      block_expert: int32 [M / block]; 0 = text, 1 = visual, -1 = empty.
      text_kernel: [d, f].
      visual_kernel: [d, f].
      block: rows per block.
      implementation: a name, an instance, or None to choose by device, dtype and shape.

    Returns:
      [M, f] in the dtype of x.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    kernels = _kernels(x, text_kernel, visual_kernel)
    _check_rows(x, block_expert, block)
    chosen = resolve(implementation, _problem("matmul", x, block_expert, block, text_kernel.shape[1]))
    if not x.shape[0]:  # kernels have at least one block
        return jnp.zeros((0, text_kernel.shape[1]), x.dtype)
    return vjp.matmul(vjp.Call(chosen, block), x, block_expert, kernels, None)


def modality_ffn(
    x: jax.Array,
    block_expert: jax.Array,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    block: int = 128,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """SwiGLU FFN of each row's own expert: (silu(x @ gate) * (x @ up)) @ down. Mono-InternVL eq. 4-5 (MMoE).

    Args:
      x: [M, d], grouped: every block of ``block`` rows has one expert.
      block_expert: int32 [M / block]; 0 = text, 1 = visual, -1 = empty.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      block: rows per block.
      implementation: a name, an instance, or None to choose by device, dtype and shape.
      save_gate_up: keep gate and up (2 * M * ff elements in the dtype of x) for the backward pass, or recompute them.

    Returns:
      [M, d] in the dtype of x; zeros in empty blocks.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    weights = _ffn_weights(x, text_weights, visual_weights)
    _check_rows(x, block_expert, block)
    chosen = resolve(implementation, _problem("ffn", x, block_expert, block, weights[TEXT].gate.shape[1]))
    if not x.shape[0]:  # kernels have at least one block
        return jnp.zeros_like(x)
    return vjp.ffn(vjp.Call(chosen, block, save_gate_up), x, block_expert, weights, None)


def permuted_ffn(
    x: jax.Array,
    block_map: BlockMap,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """``modality_ffn`` of rows in any order: x [N, d] -> [N, d]. Gathers on load where the implementation can.

    Args:
      x: [N, d] in the order of the mask that ``block_map`` was made from.
      block_map: from ``make_block_map``; rows that were not valid give zeros.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      implementation: as for ``modality_ffn``.
      save_gate_up: as for ``modality_ffn``.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    weights = _ffn_weights(x, text_weights, visual_weights)
    block_expert, block = block_map.block_expert, block_map.block
    chosen = resolve(implementation, _problem("ffn", x, block_expert, block, weights[TEXT].gate.shape[1]))
    return _permuted(vjp.ffn, vjp.Call(chosen, block, save_gate_up), x, block_map, weights)


def permuted_matmul(
    x: jax.Array,
    block_map: BlockMap,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """``modality_matmul`` of rows in any order: x [N, d] -> [N, f]; arguments and errors as for ``permuted_ffn``."""
    kernels = _kernels(x, text_kernel, visual_kernel)
    block_expert, block = block_map.block_expert, block_map.block
    chosen = resolve(implementation, _problem("matmul", x, block_expert, block, text_kernel.shape[1]))
    return _permuted(vjp.matmul, vjp.Call(chosen, block), x, block_map, kernels)


def unsorted_ffn(
    x: jax.Array,
    mask: jax.Array,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    block: int = 128,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """The paper's variant (Mono-InternVL-1.5, fused kernel): rows stay where they are, x [N, d] -> [N, d].

    Each expert runs over the blocks in which its modality occurs and exits the others at once; a block with both
    modalities is computed by both, and the results are merged by ``mask`` (bool [N], True = visual). The other
    arguments and the errors are as for ``modality_ffn``.
    """
    run = partial(modality_ffn, block=block, implementation=implementation, save_gate_up=save_gate_up)
    return _unsorted(run, x, mask, text_weights, visual_weights, block)


def unsorted_matmul(
    x: jax.Array,
    mask: jax.Array,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    block: int = 128,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """``unsorted_ffn`` for one matrix per expert: x [N, d] -> [N, f]."""
    run = partial(modality_matmul, block=block, implementation=implementation)
    return _unsorted(run, x, mask, text_kernel, visual_kernel, block)


# ======================================================================================================================
# Helpers
# ======================================================================================================================


def _permuted(
    run: Callable[..., jax.Array], call: vjp.Call, x: jax.Array, block_map: BlockMap, weights: tuple
) -> jax.Array:
    """``run`` (``vjp.ffn`` or ``vjp.matmul``) on rows in original order, with the result in original order."""
    if x.shape[0] != block_map.num_rows:
        raise ValueError(f"x has {x.shape[0]} rows, but the block map has {block_map.num_rows}")
    if call.implementation.gathers_rows:
        y = run(call, x, block_map.block_expert, weights, block_map)
    else:
        y = run(call, group_rows(x, block_map), block_map.block_expert, weights, None)
    return ungroup_rows(y, block_map)


def _unsorted(run: Callable[..., jax.Array], x: jax.Array, mask: jax.Array, text, visual, block: int) -> jax.Array:
    """``run`` (``modality_ffn`` or ``modality_matmul``) once per expert over the blocks in which it occurs, merged."""
    rows = x.shape[0]
    if mask.shape != (rows,) or mask.dtype != bool:
        raise ValueError(f"mask must be bool [{rows}] like the rows of x, not {mask.dtype} {mask.shape}")
    padding = max(-(-rows // block), 1) * block - rows
    xp = jnp.pad(x, ((0, padding), (0, 0)))
    visual_rows = jnp.pad(mask, (0, padding)).reshape(-1, block)
    text_rows = jnp.pad(~mask, (0, padding)).reshape(-1, block)
    # The other expert does not take part in a pass, and must not produce weight gradients (zeros) either.
    idle = jax.lax.stop_gradient
    by_visual = run(xp, jnp.where(visual_rows.any(1), VISUAL, EMPTY), idle(text), visual)
    by_text = run(xp, jnp.where(text_rows.any(1), TEXT, EMPTY), text, idle(visual))
    return jnp.where(mask[:, None], by_visual[:rows], by_text[:rows])


def _problem(op: str, x: jax.Array, block_expert: jax.Array, block: int, ff: int) -> Problem:
    return Problem(op, block_expert.shape[0] * block, block, x.shape[1], ff, x.dtype.name, device_key())


def _check_rows(x: jax.Array, block_expert: jax.Array, block: int) -> None:
    if x.ndim != 2 or block_expert.ndim != 1 or x.shape[0] != block_expert.shape[0] * block:
        raise ValueError(
            f"x {x.shape} must be [blocks * block, d] with block_expert {block_expert.shape} and block {block}"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, not {x.dtype}")
    if not np.issubdtype(block_expert.dtype, np.integer):
        raise ValueError(f"block_expert must be int32, not {block_expert.dtype}")


def _check_shapes(name: str, arrays: Pair, expected: tuple[int, ...]) -> None:
    for expert, array in zip(("text", "visual"), arrays):
        if array.shape != expected:
            raise ValueError(f"{expert} {name} is {array.shape}, expected {expected}")


def _kernels(x: jax.Array, text_kernel: jax.Array, visual_kernel: jax.Array) -> Pair:
    _check_shapes("kernel", (text_kernel, visual_kernel), (x.shape[-1], text_kernel.shape[-1]))
    return text_kernel, visual_kernel


def _ffn_weights(x, text_weights, visual_weights) -> tuple[FfnWeights, FfnWeights]:
    weights = (FfnWeights(*text_weights), FfnWeights(*visual_weights))
    d, ff = x.shape[-1], weights[TEXT].gate.shape[-1]
    for name, shape in (("gate", (d, ff)), ("up", (d, ff)), ("down", (ff, d))):
        _check_shapes(name, tuple(getattr(w, name) for w in weights), shape)
    return weights
