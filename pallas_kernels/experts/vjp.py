"""The one custom_vjp of the grouped matmuls, for all implementations.

Implementations provide primitives (``contract.Implementation``) and need not handle freezing; this module decides what
is computed:

    forward   swiglu (gate + up + SiLU, saving gate and up or not), matmul (down)
    backward  [swiglu again if gate and up were not saved]
              swiglu_backward: dh = dy @ down.T, then dgate, dup and h, elementwise
              swiglu_dx: dgate @ gate.T + dup @ up.T                           only if x is perturbed
              weight_gradient(h, dy), (x, dgate), (x, dup)                     per expert, only for perturbed weights
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from pallas_kernels.experts.block_map import TEXT, VISUAL, BlockMap, take_rows
from pallas_kernels.experts.contract import FfnWeights, Implementation, Pair


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call."""

    implementation: Implementation
    block: int
    save_gate_up: bool = True


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which inputs are differentiated; static, so that it shapes the backward program."""

    x: bool
    weights: tuple  # one bool (matmul) or FfnWeights of bools (ffn) per expert

    def any_weight(self, name: str) -> bool:
        return any(getattr(expert, name) for expert in self.weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(call: Call, x: jax.Array, block_expert: jax.Array, kernels: Pair, block_map: BlockMap | None) -> jax.Array:
    """y [M, f], grouped. With a block map, x is [N, d] in original order and gathered on load."""
    ops = call.implementation
    return ops.matmul(x, block_expert, _cast(kernels, x), block=call.block, **_gather_on_load(block_map))


def _matmul_fwd(call, x, block_expert, kernels, block_map):
    wanted = Wanted(x.perturbed, tuple(k.perturbed for k in kernels))
    x, block_expert, kernels, block_map = _values((x, block_expert, kernels, block_map))
    y = matmul(call, x, block_expert, kernels, block_map)
    return y, (x if any(wanted.weights) else None, block_expert, kernels, block_map, wanted)


def _matmul_bwd(call, residuals, dy):
    x, block_expert, kernels, block_map, wanted = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, (None, None), None
    ops, block = call.implementation, call.block
    dx = ops.matmul(dy, block_expert, _cast(kernels, dy), block=block, transpose=True) if wanted.x else None
    dx, x = _in_original_order(dx, block_map), _in_grouped_order(x, block_map)
    dkernels = tuple(
        ops.weight_gradient(x, dy, block_expert, e, block=block, out_dtype=kernels[e].dtype)
        if wanted.weights[e]
        else None
        for e in (TEXT, VISUAL)
    )
    return dx, None, dkernels, None


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ffn(call: Call, x: jax.Array, block_expert, weights: tuple[FfnWeights, FfnWeights], block_map: BlockMap | None):
    """y [M, d], grouped. With a block map, x is [N, d] in original order and gathered on load."""
    return _ffn_forward(call, x, block_expert, weights, block_map, save=False)[0]


def _ffn_forward(call, x, block_expert, weights, block_map, *, save):
    gates, ups, downs = _by_matrix(weights, x)
    h, gate, up = _swiglu(call, x, block_expert, gates, ups, block_map, save=save)
    return call.implementation.matmul(h, block_expert, downs, block=call.block), gate, up


def _swiglu(call, x, block_expert, gates, ups, block_map, *, save):
    ops = call.implementation
    return ops.swiglu(x, block_expert, gates, ups, block=call.block, save=save, **_gather_on_load(block_map))


def _ffn_fwd(call, x, block_expert, weights, block_map):
    wanted = Wanted(x.perturbed, tuple(FfnWeights(*(m.perturbed for m in expert)) for expert in weights))
    x, block_expert, weights, block_map = _values((x, block_expert, weights, block_map))
    y, gate, up = _ffn_forward(call, x, block_expert, weights, block_map, save=call.save_gate_up)
    needs_x = not call.save_gate_up or wanted.any_weight("gate") or wanted.any_weight("up")
    return y, (x if needs_x else None, gate, up, block_expert, weights, block_map, wanted)


def _ffn_bwd(call, residuals, dy):
    x, gate, up, block_expert, weights, block_map, wanted = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None, (FfnWeights(None, None, None),) * 2, None
    ops, block = call.implementation, call.block
    gates, ups, downs = _by_matrix(weights, dy)
    if gate is None:
        _, gate, up = _swiglu(call, x, block_expert, gates, ups, block_map, save=True)
    h, dgate, dup = ops.swiglu_backward(dy, block_expert, downs, gate, up, block=block)

    dx = ops.swiglu_dx(dgate, dup, block_expert, gates, ups, block=block) if wanted.x else None
    dx, x = _in_original_order(dx, block_map), _in_grouped_order(x, block_map)

    def weight_gradient(expert: int, name: str, left: jax.Array, right: jax.Array) -> jax.Array | None:
        if not getattr(wanted.weights[expert], name):
            return None
        dtype = getattr(weights[expert], name).dtype
        return ops.weight_gradient(left, right, block_expert, expert, block=block, out_dtype=dtype)

    dweights = tuple(
        FfnWeights(
            gate=weight_gradient(e, "gate", x, dgate),
            up=weight_gradient(e, "up", x, dup),
            down=weight_gradient(e, "down", h, dy),
        )
        for e in (TEXT, VISUAL)
    )
    return dx, None, dweights, None


ffn.defvjp(_ffn_fwd, _ffn_bwd, symbolic_zeros=True)


def _gather_on_load(block_map: BlockMap | None) -> dict[str, jax.Array]:
    return {} if block_map is None else {"rows": block_map.source}


def _in_original_order(x: jax.Array | None, block_map: BlockMap | None) -> jax.Array | None:
    return x if x is None or block_map is None else take_rows(x, block_map.position)


def _in_grouped_order(x: jax.Array | None, block_map: BlockMap | None) -> jax.Array | None:
    return x if x is None or block_map is None else take_rows(x, block_map.source)


def _values(tree):
    return jax.tree.map(
        lambda v: v.value, tree, is_leaf=lambda v: isinstance(v, jax.custom_derivatives.CustomVJPPrimal)
    )


def _cast(arrays: Pair, like: jax.Array) -> Pair:
    return tuple(a.astype(like.dtype) for a in arrays)


def _by_matrix(weights: tuple[FfnWeights, FfnWeights], like: jax.Array) -> tuple[Pair, Pair, Pair]:
    """(text, visual) of FfnWeights -> gates, ups, downs, each a pair in the dtype of ``like``."""
    return tuple(_cast(pair, like) for pair in zip(*weights))
