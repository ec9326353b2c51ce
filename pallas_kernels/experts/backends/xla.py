"""Implementations that leave the matmuls to XLA: static split (training), both experts (oracle), tiles, ragged_dot."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from pallas_kernels.experts.contract import FfnWeights, Implementation, Problem, swiglu_forward
from pallas_kernels.experts.tile_map import EMPTY, TEXT, VISUAL, take_rows

# ======================================================================================================================
# The training default: a static boundary, plain functions, plain autodiff
# ======================================================================================================================


def split_matmul(x: jax.Array, visual_slots: int, text_kernel: jax.Array, visual_kernel: jax.Array) -> jax.Array:
    """Slots [..., :visual_slots, :] times the visual kernel, the others times the text kernel: two dense GEMMs.

    Args:
      x: [..., S, d], visual slots first.
      visual_slots: V, static, 0 <= V <= S.
      text_kernel: [d, f].
      visual_kernel: [d, f].

    Returns:
      [..., S, f] in the dtype of x. Differentiated by JAX: what is frozen costs nothing.
    """
    parts = [dot(x[..., :visual_slots, :], visual_kernel), dot(x[..., visual_slots:, :], text_kernel)]
    return jnp.concatenate(parts, axis=-2)


def split_ffn(x: jax.Array, visual_slots: int, text_weights: FfnWeights, visual_weights: FfnWeights) -> jax.Array:
    """SwiGLU of each slot's own expert with a static boundary: x [..., S, d] -> [..., S, d]; see `split_matmul`."""
    parts = [
        dense_ffn(x[..., :visual_slots, :], visual_weights),
        dense_ffn(x[..., visual_slots:, :], text_weights),
    ]
    return jnp.concatenate(parts, axis=-2)


def dense_ffn(x: jax.Array, weights: FfnWeights) -> jax.Array:
    """One SwiGLU FFN over all rows, [..., d] -> [..., d]."""
    return dot(jax.nn.silu(dot(x, weights.gate)) * dot(x, weights.up), weights.down)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis of x, float32 sums, in the dtype of x."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


# ======================================================================================================================
# The same behind the contract
# ======================================================================================================================


def _rows_of(tile_expert: jax.Array, tile: int) -> jax.Array:
    """Expert of each row, [M, 1]."""
    return jnp.repeat(tile_expert, tile)[:, None]


def _by_tile(x: jax.Array, tile: int) -> jax.Array:
    """[M, n] -> [M / tile, tile, n]."""
    return x.reshape(-1, tile, x.shape[1])


def _matmul(x: jax.Array, kernel: jax.Array, transpose: bool, out_dtype: jnp.dtype | None) -> jax.Array:
    contracted = ((1,), (1 if transpose else 0,))
    y = jax.lax.dot_general(x, kernel, (contracted, ((), ())), preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


class _Unfused(Implementation):
    """SwiGLU as two matmuls and an elementwise step that XLA fuses as it likes."""

    def swiglu(self, x, tile_expert, gates, ups, *, tile, save, rows=None):
        gate = self.matmul(x, tile_expert, gates, tile=tile, out_dtype=jnp.float32)
        up = self.matmul(x, tile_expert, ups, tile=tile, out_dtype=jnp.float32)
        h = swiglu_forward(gate, up, x.dtype)
        return (h, gate.astype(x.dtype), up.astype(x.dtype)) if save else (h, None, None)


@dataclasses.dataclass(frozen=True)
class XlaSplit(_Unfused):
    """Rows [0, visual_rows) are visual, the others text, both static: dense GEMMs on two slices.

    Attributes:
      visual_rows: the boundary, a multiple of the tile. It must agree with `tile_expert` (empty tiles aside).
    """

    name: ClassVar[str] = "xla_split"
    visual_rows: int | None = None

    def unsupported(self, problem: Problem) -> str | None:
        if self.visual_rows is None:
            return "needs a static boundary, XlaSplit(visual_rows=...)"
        if self.visual_rows % problem.tile or self.visual_rows > problem.rows:
            return f"boundary {self.visual_rows} is no multiple of tile {problem.tile} within {problem.rows} rows"
        return None

    def at_boundary(self, visual_rows: int) -> Self:
        return XlaSplit(visual_rows)

    def matmul(self, x, tile_expert, weights, *, tile, transpose=False, out_dtype=None, rows=None):
        x = jnp.where(_rows_of(tile_expert, tile) == EMPTY, 0, x)
        parts = ((x[: self.visual_rows], weights[VISUAL]), (x[self.visual_rows :], weights[TEXT]))
        return jnp.concatenate([_matmul(part, w, transpose, out_dtype) for part, w in parts])

    def weight_gradient(self, x, dy, tile_expert, expert, *, tile, out_dtype):
        own = slice(0, self.visual_rows) if expert == VISUAL else slice(self.visual_rows, None)
        filled = _rows_of(tile_expert, tile)[own] != EMPTY
        return _weight_gradient(jnp.where(filled, x[own], 0), jnp.where(filled, dy[own], 0), out_dtype)


@dataclasses.dataclass(frozen=True)
class DenseBoth(_Unfused):
    """The oracle and the paper's naive form: both experts on all rows, chosen by mask. Twice the work."""

    name: ClassVar[str] = "dense_both"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, tile_expert, weights, *, tile, transpose=False, out_dtype=None, rows=None):
        expert = _rows_of(tile_expert, tile)
        by_text, by_visual = (_matmul(x, w, transpose, out_dtype) for w in weights)
        return jnp.where(expert == VISUAL, by_visual, jnp.where(expert == TEXT, by_text, 0))

    def weight_gradient(self, x, dy, tile_expert, expert, *, tile, out_dtype):
        own = _rows_of(tile_expert, tile) == expert
        return _weight_gradient(jnp.where(own, x, 0), jnp.where(own, dy, 0), out_dtype)


def _weight_gradient(x: jax.Array, dy: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class XlaTiled(_Unfused):
    """A loop over tiles that branches on the tile's expert: no row computed twice, empty tiles skipped.

    The default on a CPU, where a branch is free and a tile fills the cores; accelerators want whole matmuls.
    """

    name: ClassVar[str] = "xla_tiled"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, tile_expert, weights, *, tile, transpose=False, out_dtype=None, rows=None):
        columns = weights[TEXT].shape[0 if transpose else 1]

        def empty(rows_of_tile):
            return jnp.zeros((tile, columns), out_dtype or x.dtype)

        def one_tile(of_tile):
            expert, rows_of_tile = of_tile
            branches = [partial(_matmul, kernel=w, transpose=transpose, out_dtype=out_dtype) for w in weights]
            return jax.lax.switch(expert - EMPTY, [empty, *branches], rows_of_tile)

        return jax.lax.map(one_tile, (tile_expert, _by_tile(x, tile))).reshape(-1, columns)

    def weight_gradient(self, x, dy, tile_expert, expert, *, tile, out_dtype):
        def add_tile(total, of_tile):
            tiles_expert, *rows_of_tile = of_tile
            own = partial(_weight_gradient, *rows_of_tile, jnp.float32)
            return jax.lax.cond(tiles_expert == expert, lambda: total + own(), lambda: total), None

        zeros = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        total, _ = jax.lax.scan(add_tile, zeros, (tile_expert, _by_tile(x, tile), _by_tile(dy, tile)))
        return total.astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class Ragged(_Unfused):
    """jax.lax.ragged_dot: native on TPU, masked dense (twice the work) on CPU and GPU.

    It wants contiguous groups and stacked weights: the experts are stacked at run time, and tiles are put in order
    unless they already are.

    Attributes:
      in_order: the tiles come visual first, then text, then empty, as `make_tile_map` leaves them.
    """

    name: ClassVar[str] = "ragged"
    in_order: bool = False

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def matmul(self, x, tile_expert, weights, *, tile, transpose=False, out_dtype=None, rows=None):
        weights = [w.T if transpose else w for w in weights]
        stacked = jnp.stack([weights[VISUAL], weights[TEXT]])
        order, counts = self._order(tile_expert, (VISUAL, TEXT))
        y = jax.lax.ragged_dot(
            self._reorder(x, order, tile), stacked, counts * tile, preferred_element_type=jnp.float32
        ).astype(out_dtype or x.dtype)
        # What ragged_dot leaves beyond its groups differs between backends.
        filled = jnp.arange(x.shape[0]) < jnp.sum(counts) * tile
        y = jnp.where(filled[:, None], y, 0)
        return y if order is None else self._reorder(y, jnp.argsort(order), tile)

    def weight_gradient(self, x, dy, tile_expert, expert, *, tile, out_dtype):
        # The expert's own tiles go first and are the only group; rows beyond it are left out.
        order = jnp.argsort(tile_expert != expert)
        rows = jnp.sum(tile_expert == expert, dtype=jnp.int32) * tile
        in_group = (jnp.arange(x.shape[0]) < rows)[:, None]
        x, dy = (jnp.where(in_group, self._reorder(v, order, tile), 0) for v in (x, dy))
        dimensions = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        dw = jax.lax.ragged_dot_general(x, dy, rows[None], dimensions, preferred_element_type=jnp.float32)
        return dw[0].astype(out_dtype)

    def _order(self, tile_expert: jax.Array, experts: tuple[int, int]) -> tuple[jax.Array | None, jax.Array]:
        """Order that makes the groups contiguous (None if they are), and the tiles of each."""
        counts = jnp.stack([jnp.sum(tile_expert == e, dtype=jnp.int32) for e in experts])
        return (None if self.in_order else jnp.argsort(-tile_expert)), counts

    @staticmethod
    def _reorder(x: jax.Array, order: jax.Array | None, tile: int) -> jax.Array:
        return x if order is None else take_rows(_by_tile(x, tile), order).reshape(x.shape)
