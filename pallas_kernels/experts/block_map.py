"""Rows grouped by modality: the block map, built once per batch from the modality mask.

    mask      v t v v t t t v            N = 8 rows in sequence order, v = visual
    grouped   v v v v | t t t t | . .    the same rows, one expert per block of ``block`` rows, padded to whole blocks
    expert        1   |    0    | -1     ``block_expert``: 0 = text, 1 = visual, -1 = empty (skipped, rows are zero)

Routing is known in advance (from the token ids), so rows are sorted once per batch, not once per layer. Sizes are
static too: two runs waste at most one block beyond the rounding of N, hence ``num_blocks = ceil(N / block) + 1``.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

TEXT, VISUAL, EMPTY = 0, 1, -1


@partial(jax.tree_util.register_dataclass, data_fields=("block_expert", "source", "position"), meta_fields=("block",))
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Where each row goes. There are M = num_blocks * block grouped rows and N original rows.

    Attributes:
      block_expert: int32 [num_blocks], expert of each block; visual blocks first, then text, then empty ones.
      source: int32 [M], original row of each grouped row; N for a padding row.
      position: int32 [N], grouped row of each original row; M for a row that was not ``valid``.
      block: rows per block (static).
    """

    block_expert: jax.Array
    source: jax.Array
    position: jax.Array
    block: int

    @property
    def num_rows(self) -> int:
        """Number of original rows, N."""
        return self.position.shape[0]

    @property
    def num_grouped_rows(self) -> int:
        """Number of grouped rows, M >= N."""
        return self.source.shape[0]


def num_blocks(rows: int, block: int) -> int:
    """Number of blocks that always suffice for ``rows`` rows of two modalities, whatever their shares."""
    return -(-rows // block) + 1


def make_block_map(mask: jax.Array, *, block: int = 128, valid: jax.Array | None = None) -> BlockMap:
    """The block map of a modality mask. Jit-able; all output sizes follow from N and ``block``.

    Args:
      mask: bool [N], True where the row is visual.
      block: rows per block; a multiple of what the implementation requires (128 works for all of them).
      valid: bool [N], False for rows that no expert should compute (padding); all rows by default.

    Raises:
      ValueError: ``mask`` is not bool [N], ``valid`` does not match it, or ``block`` is below 1.
    """
    if mask.ndim != 1 or mask.dtype != bool or block < 1:
        raise ValueError(f"mask must be bool [N] and block >= 1, got mask {mask.dtype} {mask.shape} and block {block}")
    if valid is not None and (valid.shape != mask.shape or valid.dtype != bool):
        raise ValueError(f"valid must be bool {mask.shape} like mask, got {valid.dtype} {valid.shape}")
    rows, blocks = mask.shape[0], num_blocks(mask.shape[0], block)
    live = jnp.ones(rows, bool) if valid is None else valid
    visual, text = mask & live, ~mask & live
    visual_blocks = -(-jnp.sum(visual, dtype=jnp.int32) // block)
    text_blocks = -(-jnp.sum(text, dtype=jnp.int32) // block)

    block_index = jnp.arange(blocks, dtype=jnp.int32)
    block_expert = jnp.where(
        block_index < visual_blocks, VISUAL, jnp.where(block_index < visual_blocks + text_blocks, TEXT, EMPTY)
    )
    rank = jnp.where(
        visual,
        _running_count(visual) - 1,
        visual_blocks * block + _running_count(text) - 1,
    )
    position = jnp.where(live, rank, blocks * block)
    # Each grouped row has at most one source, so this scatter has no collisions; rows past the end are dropped.
    source = jnp.full(blocks * block, rows, jnp.int32).at[position].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    return BlockMap(block_expert.astype(jnp.int32), source, position, block)


def _running_count(mask: jax.Array) -> jax.Array:
    """Cumulative sum of a mask, int32. The barriers keep XLA:GPU from fusing it with the reductions around it, which
    took minutes to compile at N = 4096."""
    return jax.lax.optimization_barrier(jnp.cumsum(jax.lax.optimization_barrier(mask), dtype=jnp.int32))


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first axis, zeros where the index is past the end (a padding row)."""
    if x.shape[0] == 0:
        return jnp.zeros((*index.shape, *x.shape[1:]), x.dtype)
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    return take_rows(x, index)


def _gather_fwd(x, index, inverse):
    return take_rows(x, index), (index, inverse)


def _gather_bwd(residuals, dy):
    index, inverse = residuals
    return take_rows(dy, inverse), _no_gradient(index), _no_gradient(inverse)


def _no_gradient(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


# The transpose of a permutation is a gather by its inverse; autodiff would emit a scatter-add instead.
_gather.defvjp(_gather_fwd, _gather_bwd)


def group_rows(x: jax.Array, block_map: BlockMap) -> jax.Array:
    """[N, ...] in original order -> [M, ...] grouped by expert; padding rows are zero.

    Raises:
      ValueError: x does not have the number of rows that the block map was made for.
    """
    _check_rows(x, block_map.num_rows)
    return _gather(x, block_map.source, block_map.position)


def ungroup_rows(y: jax.Array, block_map: BlockMap) -> jax.Array:
    """[M, ...] grouped -> [N, ...] in original order; rows that were not valid are zero.

    Raises:
      ValueError: y does not have the number of grouped rows of the block map.
    """
    _check_rows(y, block_map.num_grouped_rows)
    return _gather(y, block_map.position, block_map.source)


def _check_rows(x: jax.Array, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"the block map expects {rows} rows, got {x.shape[0]}")
