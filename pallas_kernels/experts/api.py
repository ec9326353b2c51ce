"""Modality-grouped expert matmuls: `modality_ffn` and `modality_matmul`, forward and backward, behind one contract.

The contract, for callers
-------------------------
    tile_map = make_tile_map(mask, tile=128)                       # once per batch, mask bool [N]
    xg = group_rows(x, tile_map)                                   # [N, d] -> [M, d], one expert per tile of rows
    yg = modality_ffn(xg, tile_map.tile_expert, text, visual, tile=tile_map.tile)
    y = ungroup_rows(yg, tile_map)                                 # [M, d] -> [N, d]

or, in one call that lets an implementation gather on load, `y = permuted_ffn(x, tile_map, text, visual)`. Keeping the
whole residual stream grouped and permuting once per batch is cheaper still. `unsorted_ffn` is the form of the
Mono-InternVL-1.5 paper (no permutation; a tile with both kinds is computed twice and merged), for comparison.
`modality_matmul`, `permuted_matmul` and `unsorted_matmul` are the same for one matrix per expert.

x is bfloat16 or float32. Weights are `FfnWeights(gate, up, down)` in [in, out] layout, one per expert, never stacked;
they may be kept in another float dtype than x (float32 masters): they are rounded to x's dtype inside, and their
gradients come back in their own dtype straight from the float32 sums. Rows of empty tiles (-1) come out as zeros and
are not read. Rows that pad a tile must be zero, or have a zero cotangent, or they count in the weight gradients
(`group_rows` and `ungroup_rows` see to both).

Freezing needs no flag: what is not differentiated is not perturbed, and its gradient is never traced. That holds under
jit, scan, checkpoint and shard_map (tests count the matmuls of compiled programs). Each expert's weight gradients are
separate calls, so training one expert of two drops exactly the calls of the other.

The contract, for implementations
---------------------------------
Subclass `base.Implementation` (its docstrings fix shapes and dtypes) in a module of your own, as a frozen dataclass
whose fields are the tuning parameters, and register it by name in `registry.IMPLEMENTATIONS`. Write
  - `unsupported(problem)`: a reason, or None;
  - `here()`: an instance that computes on this machine (interpreted where need be), or raise `Unavailable(reason)`;
  - `aot_checks()`: compilations for absent hardware;
  - the primitives `matmul`, `swiglu`, `weight_gradient`, and, to fuse, `swiglu_backward` and `swiglu_dx`.
The one custom_vjp below calls them; it decides what is computed, so primitives know nothing of freezing:

    forward   swiglu (gate + up + SiLU, saving gate and up or not), matmul (down)
    backward  [swiglu again, if gate and up were not saved]
              swiglu_backward: dh = dy @ down.T, then dgate, dup and h, elementwise
              swiglu_dx: dgate @ gate.T + dup @ up.T                           only if x is perturbed
              weight_gradient(h, dy), (x, dgate), (x, dup)                     per expert, only for perturbed weights

The conformance suite (cases and oracle in `conformance`, tests in tests/pallas_kernels/kernel_suite.py) is inherited by
one test class per implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.experts.contract import FfnWeights, Implementation, Pair, Problem
from pallas_kernels.experts.tile_map import EMPTY, TEXT, VISUAL, TileMap, group_rows, take_rows, ungroup_rows
from pallas_kernels.registry import device_key, resolve

# ======================================================================================================================
# Public functions
# ======================================================================================================================


def modality_matmul(
    x: jax.Array,
    tile_expert: jax.Array,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    tile: int = 128,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """Each row times the kernel of its own expert (the QKV of visual attention experts).

    Args:
      x: [M, d], grouped: every tile of `tile` rows has one expert.
      tile_expert: int32 [M / tile]; 0 = text, 1 = visual, -1 = empty.
      text_kernel: [d, f].
      visual_kernel: [d, f].
      tile: rows per tile.
      implementation: a name, an instance, or None to choose by device, dtype and shape.

    Returns:
      [M, f] in the dtype of x.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    kernels = _kernels(x, text_kernel, visual_kernel)
    _check_rows(x, tile_expert, tile)
    chosen = resolve(implementation, _problem("matmul", x, tile_expert, tile, text_kernel.shape[1]))
    if not x.shape[0]:  # kernels have at least one tile
        return jnp.zeros((0, text_kernel.shape[1]), x.dtype)
    return _matmul(_Call(chosen, tile), x, tile_expert, kernels, None)


def modality_ffn(
    x: jax.Array,
    tile_expert: jax.Array,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    tile: int = 128,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """SwiGLU FFN of each row's own expert: (silu(x @ gate) * (x @ up)) @ down. Mono-InternVL eq. 4-5 (MMoE).

    Args:
      x: [M, d], grouped: every tile of `tile` rows has one expert.
      tile_expert: int32 [M / tile]; 0 = text, 1 = visual, -1 = empty.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      tile: rows per tile.
      implementation: a name, an instance, or None to choose by device, dtype and shape.
      save_gate_up: keep gate and up (2 * M * ff elements in the dtype of x) for the backward pass, or recompute them.

    Returns:
      [M, d] in the dtype of x; zeros in empty tiles.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    weights = _ffn_weights(x, text_weights, visual_weights)
    _check_rows(x, tile_expert, tile)
    chosen = resolve(implementation, _problem("ffn", x, tile_expert, tile, weights[TEXT].gate.shape[1]))
    if not x.shape[0]:  # kernels have at least one tile
        return jnp.zeros_like(x)
    return _ffn(_Call(chosen, tile, save_gate_up), x, tile_expert, weights, None)


def permuted_ffn(
    x: jax.Array,
    tile_map: TileMap,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """`modality_ffn` of rows in any order: x [N, d] -> [N, d]. Gathers on load where the implementation can.

    Args:
      x: [N, d] in the order of the mask that `tile_map` was made from.
      tile_map: from `make_tile_map`; rows that were not valid come out as zeros.
      text_weights: gate [d, ff], up [d, ff], down [ff, d].
      visual_weights: likewise.
      implementation: as for `modality_ffn`.
      save_gate_up: as for `modality_ffn`.

    Raises:
      ValueError: shapes that do not fit together.
      Unavailable: the named implementation cannot serve this call; the message says why.
    """
    weights = _ffn_weights(x, text_weights, visual_weights)
    tile_expert, tile = tile_map.tile_expert, tile_map.tile
    chosen = resolve(implementation, _problem("ffn", x, tile_expert, tile, weights[TEXT].gate.shape[1]))
    return _permuted(_ffn, _Call(chosen, tile, save_gate_up), x, tile_map, weights)


def permuted_matmul(
    x: jax.Array,
    tile_map: TileMap,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """`modality_matmul` of rows in any order: x [N, d] -> [N, f]; arguments and errors as for `permuted_ffn`."""
    kernels = _kernels(x, text_kernel, visual_kernel)
    tile_expert, tile = tile_map.tile_expert, tile_map.tile
    chosen = resolve(implementation, _problem("matmul", x, tile_expert, tile, text_kernel.shape[1]))
    return _permuted(_matmul, _Call(chosen, tile), x, tile_map, kernels)


def unsorted_ffn(
    x: jax.Array,
    mask: jax.Array,
    text_weights: FfnWeights,
    visual_weights: FfnWeights,
    *,
    tile: int = 128,
    implementation: str | Implementation | None = None,
    save_gate_up: bool = True,
) -> jax.Array:
    """The paper's form (Mono-InternVL-1.5, fused kernel): rows stay where they are, x [N, d] -> [N, d].

    Each expert runs over the tiles in which its modality occurs and leaves the others at once; a tile with both kinds
    is computed by both, and the results are merged by `mask` (bool [N], True = visual). The other arguments, and
    errors, are as for `modality_ffn`.
    """
    run = partial(modality_ffn, tile=tile, implementation=implementation, save_gate_up=save_gate_up)
    return _unsorted(run, x, mask, text_weights, visual_weights, tile)


def unsorted_matmul(
    x: jax.Array,
    mask: jax.Array,
    text_kernel: jax.Array,
    visual_kernel: jax.Array,
    *,
    tile: int = 128,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """`unsorted_ffn` for one matrix per expert: x [N, d] -> [N, f]."""
    run = partial(modality_matmul, tile=tile, implementation=implementation)
    return _unsorted(run, x, mask, text_kernel, visual_kernel, tile)


# ======================================================================================================================
# The one derivative
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    implementation: Implementation
    tile: int
    save_gate_up: bool = True


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which inputs are differentiated; static, so that it shapes the backward program."""

    x: bool
    weights: tuple  # one bool (matmul) or FfnWeights of bools (ffn) per expert

    def any_weight(self, name: str) -> bool:
        return any(getattr(expert, name) for expert in self.weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: _Call, x: jax.Array, tile_expert: jax.Array, kernels: Pair, tile_map: TileMap | None) -> jax.Array:
    """y [M, f] grouped. With a tile map, x is [N, d] in original order and gathered on load."""
    ops = call.implementation
    return ops.matmul(x, tile_expert, _cast(kernels, x), tile=call.tile, **_gather_on_load(tile_map))


def _matmul_fwd(call, x, tile_expert, kernels, tile_map):
    wanted = _Wanted(x.perturbed, tuple(k.perturbed for k in kernels))
    x, tile_expert, kernels, tile_map = _values((x, tile_expert, kernels, tile_map))
    y = _matmul(call, x, tile_expert, kernels, tile_map)
    return y, (x if any(wanted.weights) else None, tile_expert, kernels, tile_map, wanted)


def _matmul_bwd(call, residuals, dy):
    x, tile_expert, kernels, tile_map, wanted = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, (None, None), None
    ops, tile = call.implementation, call.tile
    dx = ops.matmul(dy, tile_expert, _cast(kernels, dy), tile=tile, transpose=True) if wanted.x else None
    dx, x = _in_original_order(dx, tile_map), _in_grouped_order(x, tile_map)
    dkernels = tuple(
        ops.weight_gradient(x, dy, tile_expert, e, tile=tile, out_dtype=kernels[e].dtype) if wanted.weights[e] else None
        for e in (TEXT, VISUAL)
    )
    return dx, None, dkernels, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(call: _Call, x: jax.Array, tile_expert, weights: tuple[FfnWeights, FfnWeights], tile_map: TileMap | None):
    """y [M, d] grouped. With a tile map, x is [N, d] in original order and gathered on load."""
    return _ffn_forward(call, x, tile_expert, weights, tile_map, save=False)[0]


def _ffn_forward(call, x, tile_expert, weights, tile_map, *, save):
    gates, ups, downs = _by_matrix(weights, x)
    h, gate, up = _swiglu(call, x, tile_expert, gates, ups, tile_map, save=save)
    return call.implementation.matmul(h, tile_expert, downs, tile=call.tile), gate, up


def _swiglu(call, x, tile_expert, gates, ups, tile_map, *, save):
    ops = call.implementation
    return ops.swiglu(x, tile_expert, gates, ups, tile=call.tile, save=save, **_gather_on_load(tile_map))


def _ffn_fwd(call, x, tile_expert, weights, tile_map):
    wanted = _Wanted(x.perturbed, tuple(FfnWeights(*(m.perturbed for m in expert)) for expert in weights))
    x, tile_expert, weights, tile_map = _values((x, tile_expert, weights, tile_map))
    y, gate, up = _ffn_forward(call, x, tile_expert, weights, tile_map, save=call.save_gate_up)
    needs_x = not call.save_gate_up or wanted.any_weight("gate") or wanted.any_weight("up")
    return y, (x if needs_x else None, gate, up, tile_expert, weights, tile_map, wanted)


def _ffn_bwd(call, residuals, dy):
    x, gate, up, tile_expert, weights, tile_map, wanted = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, (FfnWeights(None, None, None),) * 2, None
    ops, tile = call.implementation, call.tile
    gates, ups, downs = _by_matrix(weights, dy)
    if gate is None:
        _, gate, up = _swiglu(call, x, tile_expert, gates, ups, tile_map, save=True)
    h, dgate, dup = ops.swiglu_backward(dy, tile_expert, downs, gate, up, tile=tile)

    dx = ops.swiglu_dx(dgate, dup, tile_expert, gates, ups, tile=tile) if wanted.x else None
    dx, x = _in_original_order(dx, tile_map), _in_grouped_order(x, tile_map)

    def weight_gradient(expert: int, name: str, left: jax.Array, right: jax.Array) -> jax.Array | None:
        if not getattr(wanted.weights[expert], name):
            return None
        dtype = getattr(weights[expert], name).dtype
        return ops.weight_gradient(left, right, tile_expert, expert, tile=tile, out_dtype=dtype)

    dweights = tuple(
        FfnWeights(
            gate=weight_gradient(e, "gate", x, dgate),
            up=weight_gradient(e, "up", x, dup),
            down=weight_gradient(e, "down", h, dy),
        )
        for e in (TEXT, VISUAL)
    )
    return dx, None, dweights, None


_ffn.defvjp(_ffn_fwd, _ffn_bwd, symbolic_zeros=True)


# ======================================================================================================================
# Helpers
# ======================================================================================================================


def _permuted(run: Callable[..., jax.Array], call: _Call, x: jax.Array, tile_map: TileMap, weights: tuple) -> jax.Array:
    """`run` (`_ffn` or `_matmul`) of rows in original order, back in original order."""
    if x.shape[0] != tile_map.num_rows:
        raise ValueError(f"x has {x.shape[0]} rows, the tile map {tile_map.num_rows}")
    if call.implementation.gathers_rows:
        y = run(call, x, tile_map.tile_expert, weights, tile_map)
    else:
        y = run(call, group_rows(x, tile_map), tile_map.tile_expert, weights, None)
    return ungroup_rows(y, tile_map)


def _unsorted(run: Callable[..., jax.Array], x: jax.Array, mask: jax.Array, text, visual, tile: int) -> jax.Array:
    """`run` (`modality_ffn` or `modality_matmul`) once per expert over the tiles that it occurs in, then merged."""
    rows = x.shape[0]
    if mask.shape != (rows,) or mask.dtype != bool:
        raise ValueError(f"mask must be bool [{rows}] like the rows of x, not {mask.dtype} {mask.shape}")
    padding = max(-(-rows // tile), 1) * tile - rows
    xp = jnp.pad(x, ((0, padding), (0, 0)))
    visual_rows = jnp.pad(mask, (0, padding)).reshape(-1, tile)
    text_rows = jnp.pad(~mask, (0, padding)).reshape(-1, tile)
    # The other expert takes no part in a pass, and must not leave weight gradients (zeros) behind either.
    idle = jax.lax.stop_gradient
    by_visual = run(xp, jnp.where(visual_rows.any(1), VISUAL, EMPTY), idle(text), visual)
    by_text = run(xp, jnp.where(text_rows.any(1), TEXT, EMPTY), text, idle(visual))
    return jnp.where(mask[:, None], by_visual[:rows], by_text[:rows])


def _gather_on_load(tile_map: TileMap | None) -> dict[str, jax.Array]:
    return {} if tile_map is None else {"rows": tile_map.source}


def _in_original_order(x: jax.Array | None, tile_map: TileMap | None) -> jax.Array | None:
    return x if x is None or tile_map is None else take_rows(x, tile_map.position)


def _in_grouped_order(x: jax.Array | None, tile_map: TileMap | None) -> jax.Array | None:
    return x if x is None or tile_map is None else take_rows(x, tile_map.source)


def _values(tree):
    return jax.tree.map(
        lambda v: v.value, tree, is_leaf=lambda v: isinstance(v, jax.custom_derivatives.CustomVJPPrimal)
    )


def _cast(arrays: Pair, like: jax.Array) -> Pair:
    return tuple(a.astype(like.dtype) for a in arrays)


def _by_matrix(weights: tuple[FfnWeights, FfnWeights], like: jax.Array) -> tuple[Pair, Pair, Pair]:
    """(text, visual) of FfnWeights -> gates, ups, downs, each a pair in the dtype of `like`."""
    return tuple(_cast(pair, like) for pair in zip(*weights))


def _problem(op: str, x: jax.Array, tile_expert: jax.Array, tile: int, ff: int) -> Problem:
    return Problem(op, tile_expert.shape[0] * tile, tile, x.shape[1], ff, x.dtype.name, device_key())


def _check_rows(x: jax.Array, tile_expert: jax.Array, tile: int) -> None:
    if x.ndim != 2 or tile_expert.ndim != 1 or x.shape[0] != tile_expert.shape[0] * tile:
        raise ValueError(f"x {x.shape} must be [tiles * tile, d] with tile_expert {tile_expert.shape} and tile {tile}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, not {x.dtype}")
    if not np.issubdtype(tile_expert.dtype, np.integer):
        raise ValueError(f"tile_expert must be int32, not {tile_expert.dtype}")


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
