"""Implementations that leave the matmuls to XLA: static split, both experts (oracle), blocks, ragged_dot."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from pallas_kernels.experts.block_map import EMPTY, TEXT, VISUAL, take_rows
from pallas_kernels.experts.contract import FfnWeights, Implementation, Problem, swiglu_forward
from pallas_kernels.precision import product_precision

# ======================================================================================================================
# A static boundary as in training: plain functions, plain autodiff (the models have their own, on their layers)
# ======================================================================================================================


def split_matmul(x: jax.Array, visual_slots: int, text_kernel: jax.Array, visual_kernel: jax.Array) -> jax.Array:
    """Slots [..., :visual_slots, :] times the visual kernel, the others times the text kernel: two dense GEMMs.

    Args:
      x: [..., S, d], visual slots first.
      visual_slots: V, static, 0 <= V <= S.
      text_kernel: [d, f].
      visual_kernel: [d, f].

    Returns:
      [..., S, f] in the dtype of x. Differentiated by JAX: frozen weights cost nothing.
    """
    parts = [dot(x[..., :visual_slots, :], visual_kernel), dot(x[..., visual_slots:, :], text_kernel)]
    return jnp.concatenate(parts, axis=-2)


def split_ffn(x: jax.Array, visual_slots: int, text_weights: FfnWeights, visual_weights: FfnWeights) -> jax.Array:
    """SwiGLU of each slot's own expert with a static boundary: x [..., S, d] -> [..., S, d]; see ``split_matmul``."""
    parts = [
        dense_ffn(x[..., :visual_slots, :], visual_weights),
        dense_ffn(x[..., visual_slots:, :], text_weights),
    ]
    return jnp.concatenate(parts, axis=-2)


def dense_ffn(x: jax.Array, weights: FfnWeights) -> jax.Array:
    """One SwiGLU FFN over all rows, [..., d] -> [..., d]."""
    return dot(jax.nn.silu(dot(x, weights.gate)) * dot(x, weights.up), weights.down)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis of x, in the dtype of x; accelerators accumulate in float32."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=product_precision(x))


# ======================================================================================================================
# The same as implementations of the contract
# ======================================================================================================================


def _rows_of(block_expert: jax.Array, block: int) -> jax.Array:
    """Expert of each row, [M, 1]."""
    return jnp.repeat(block_expert, block)[:, None]


def _by_block(x: jax.Array, block: int) -> jax.Array:
    """[M, n] -> [M / block, block, n]."""
    return x.reshape(-1, block, x.shape[1])


def _matmul(x: jax.Array, kernel: jax.Array, transpose: bool, out_dtype: jnp.dtype | None) -> jax.Array:
    y = _dot_general(x, kernel, (1, 1 if transpose else 0))
    return y.astype(out_dtype or x.dtype)


def _dot_general(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The float32 product of two matrices over one axis of each."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    precision = product_precision(a, b)
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class _Unfused(Implementation):
    """SwiGLU as two matmuls and an elementwise step, with fusion left to XLA."""

    def swiglu(self, x, block_expert, gates, ups, *, block, save, rows=None):
        gate = self.matmul(x, block_expert, gates, block=block, out_dtype=jnp.float32)
        up = self.matmul(x, block_expert, ups, block=block, out_dtype=jnp.float32)
        h = swiglu_forward(gate, up, x.dtype)
        return (h, gate.astype(x.dtype), up.astype(x.dtype)) if save else (h, None, None)


@dataclasses.dataclass(frozen=True)
class XlaSplit(_Unfused):
    """Rows [0, visual_rows) are visual, the others text, both static: dense GEMMs on two slices.

    Attributes:
      visual_rows: the boundary, a multiple of the block. It must agree with ``block_expert`` (empty blocks aside).
    """

    name: ClassVar[str] = "xla_split"
    visual_rows: int | None = None

    def unsupported(self, problem: Problem) -> str | None:
        if self.visual_rows is None:
            return "needs a static boundary, XlaSplit(visual_rows=...)"
        if self.visual_rows % problem.block or self.visual_rows > problem.rows:
            return f"boundary {self.visual_rows} is not a multiple of block {problem.block} within {problem.rows} rows"
        return None

    def at_boundary(self, visual_rows: int) -> Self:
        return XlaSplit(visual_rows)

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        x = jnp.where(_rows_of(block_expert, block) == EMPTY, 0, x)
        parts = ((x[: self.visual_rows], weights[VISUAL]), (x[self.visual_rows :], weights[TEXT]))
        return jnp.concatenate([_matmul(part, w, transpose, out_dtype) for part, w in parts])

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        own = slice(0, self.visual_rows) if expert == VISUAL else slice(self.visual_rows, None)
        filled = _rows_of(block_expert, block)[own] != EMPTY
        return _weight_gradient(jnp.where(filled, x[own], 0), jnp.where(filled, dy[own], 0), out_dtype)


@dataclasses.dataclass(frozen=True)
class DenseBoth(_Unfused):
    """The oracle and the paper's naive form: both experts on all rows, selected by a mask. Twice the work."""

    name: ClassVar[str] = "dense_both"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        expert = _rows_of(block_expert, block)
        by_text, by_visual = (_matmul(x, w, transpose, out_dtype) for w in weights)
        return jnp.where(expert == VISUAL, by_visual, jnp.where(expert == TEXT, by_text, 0))

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        own = _rows_of(block_expert, block) == expert
        return _weight_gradient(jnp.where(own, x, 0), jnp.where(own, dy, 0), out_dtype)


def _weight_gradient(x: jax.Array, dy: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return _dot_general(x, dy, (0, 0)).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class XlaTiled(_Unfused):
    """A loop over blocks that branches on the block's expert: no row is computed twice, and empty blocks are skipped.

    The default on a CPU, where a branch is free and a block fills the cores; accelerators need whole matmuls.
    """

    name: ClassVar[str] = "xla_tiled"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        columns = weights[TEXT].shape[0 if transpose else 1]

        def empty(rows_of_block):
            return jnp.zeros((block, columns), out_dtype or x.dtype)

        def one_block(of_block):
            expert, rows_of_block = of_block
            branches = [partial(_matmul, kernel=w, transpose=transpose, out_dtype=out_dtype) for w in weights]
            return jax.lax.switch(expert - EMPTY, [empty, *branches], rows_of_block)

        return jax.lax.map(one_block, (block_expert, _by_block(x, block))).reshape(-1, columns)

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        def add_block(total, of_block):
            expert_of_block, *rows_of_block = of_block
            own = partial(_weight_gradient, *rows_of_block, jnp.float32)
            return jax.lax.cond(expert_of_block == expert, lambda: total + own(), lambda: total), None

        zeros = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        total, _ = jax.lax.scan(add_block, zeros, (block_expert, _by_block(x, block), _by_block(dy, block)))
        return total.astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class Ragged(_Unfused):
    """jax.lax.ragged_dot: native on TPU, masked dense (twice the work) on CPU and GPU.

    It needs contiguous groups and stacked weights: the experts are stacked at run time, and blocks are sorted unless
    they already are.

    Attributes:
      in_order: the blocks are in the order of ``make_block_map``: visual, then text, then empty.
    """

    name: ClassVar[str] = "ragged"
    in_order: bool = False

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, block_expert, weights, *, block, transpose=False, out_dtype=None, rows=None):
        weights = [w.T if transpose else w for w in weights]
        stacked = jnp.stack([weights[VISUAL], weights[TEXT]])
        order, counts = self._order(block_expert, (VISUAL, TEXT))
        y = jax.lax.ragged_dot(
            self._reorder(x, order, block),
            stacked,
            counts * block,
            precision=product_precision(x, stacked),
            preferred_element_type=jnp.float32,
        ).astype(out_dtype or x.dtype)
        # The rows after the last group differ between ragged_dot's backends.
        filled = jnp.arange(x.shape[0]) < jnp.sum(counts) * block
        y = jnp.where(filled[:, None], y, 0)
        return y if order is None else self._reorder(y, jnp.argsort(order), block)

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        # The expert's own blocks go first and are the only group; rows after it are left out.
        order = jnp.argsort(block_expert != expert)
        rows = jnp.sum(block_expert == expert, dtype=jnp.int32) * block
        in_group = (jnp.arange(x.shape[0]) < rows)[:, None]
        x, dy = (jnp.where(in_group, self._reorder(v, order, block), 0) for v in (x, dy))
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        precision = product_precision(x, dy)
        dw = jax.lax.ragged_dot_general(
            x, dy, rows[None], dimensions, precision=precision, preferred_element_type=jnp.float32
        )
        return dw[0].astype(out_dtype)

    def _order(self, block_expert: jax.Array, experts: tuple[int, int]) -> tuple[jax.Array | None, jax.Array]:
        """The order that makes the groups contiguous (None if they already are), and the number of blocks of each."""
        counts = jnp.stack([jnp.sum(block_expert == e, dtype=jnp.int32) for e in experts])
        return (None if self.in_order else jnp.argsort(-block_expert)), counts

    @staticmethod
    def _reorder(x: jax.Array, order: jax.Array | None, block: int) -> jax.Array:
        return x if order is None else take_rows(_by_block(x, block), order).reshape(x.shape)
