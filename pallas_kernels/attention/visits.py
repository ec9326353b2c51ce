"""Which blocks of keys each block of queries has to visit: the work of the packed kernels, as one list.

Along a row the bounds of the intervals never decrease, so the keys that a block of queries sees are between the first
key of its first query and the last key of its last one, and form a contiguous run of blocks. Kernels iterate over the
list of all such pairs of a batch; pairs that are not in it are neither fetched nor computed.

Samples begin and end inside blocks. If a pair is only partly seen, the list says which parts of the keys each part of
the queries takes, so that blocks are large when fetched while the computation follows the samples more closely.

    block of keys        . . . .     a pair of 4 x 4 parts: queries run to the right, keys down
    in 4 parts           # . . .     the first part of the queries sees key parts 1 and 2: from 1, 2 of them
                         # # . .     the second sees key part 2: from 2, 1 of them
                         . . # #
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.contract import Intervals

# Flags of a visit, in the lowest bits of its code.
FIRST, LAST, WHOLE, ROW_FIRST, ROW_LAST = (1 << i for i in range(5))
_FLAG_BITS = 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """The blocks of a call.

    Attributes:
      rows: B.
      queries: query blocks per row.
      keys: key blocks per row.
      block_q: queries per block.
      block_k: keys per block.
      part: queries, and keys, per part of a block.
    """

    rows: int
    queries: int
    keys: int
    block_q: int
    block_k: int
    part: int

    @property
    def parts_q(self) -> int:
        return self.block_q // self.part

    @property
    def parts_k(self) -> int:
        return self.block_k // self.part

    @property
    def most(self) -> int:
        """The number of visits in a batch whose queries see everything."""
        return self.rows * self.queries * self.keys

    @property
    def _shifts(self) -> tuple[int, int, int]:
        key = _FLAG_BITS
        query = key + max(self.keys - 1, 1).bit_length()
        return key, query, query + max(self.queries - 1, 1).bit_length()

    @property
    def part_bits(self) -> int:
        """Bits that say which key parts each part of the queries takes."""
        return 2 * self.parts_q * self.parts_k.bit_length()

    def code(self, row: jax.Array, query: jax.Array, key: jax.Array, flags: jax.Array) -> jax.Array:
        key_shift, query_shift, row_shift = self._shifts
        return (row << row_shift) | (query << query_shift) | (key << key_shift) | flags

    def row(self, code: jax.Array) -> jax.Array:
        return code >> self._shifts[2]

    def query(self, code: jax.Array) -> jax.Array:
        _, query_shift, row_shift = self._shifts
        return (code >> query_shift) & ((1 << (row_shift - query_shift)) - 1)

    def key(self, code: jax.Array) -> jax.Array:
        key_shift, query_shift, _ = self._shifts
        return (code >> key_shift) & ((1 << (query_shift - key_shift)) - 1)

    def keys_of_part(self, parts: jax.Array, part: int) -> tuple[jax.Array, jax.Array]:
        """(first key part, number of key parts) that a part of the queries takes."""
        bits = self.parts_k.bit_length()
        mask = (1 << bits) - 1
        return (parts >> (2 * bits * part)) & mask, (parts >> (2 * bits * part + bits)) & mask


class Visits(NamedTuple):
    """The visits of a batch, row after row.

    Attributes:
      codes: int32 [``Grid.most``], the row, blocks and flags of each visit.
      parts: int32 [``Grid.most``], the key parts that each part of the queries takes.
      count: int32 scalar, the number of visits that the arrays hold.
    """

    codes: jax.Array
    parts: jax.Array
    count: jax.Array


def make_visits(intervals: Intervals, grid: Grid) -> Visits:
    """The visits of all rows, ordered by queries, then by keys."""
    first, last = (a.reshape(-1, grid.block_q) for a in (intervals.first, intervals.last))  # [blocks, block_q]
    start, stop = first[:, 0] // grid.block_k, last[:, -1] // grid.block_k  # blocks of keys
    ends = jnp.cumsum(stop - start + 1)
    step = jnp.arange(grid.most, dtype=jnp.int32)
    block = jnp.minimum(jnp.searchsorted(ends, step, side="right", method="compare_all"), len(ends) - 1)
    key = stop[block] - (ends[block] - 1 - step)
    row, query = block // grid.queries, block % grid.queries
    is_first, is_last = key == start[block], key == stop[block]
    # Every query of the block sees every key of the block: no mask is needed.
    whole = (first[:, -1][block] <= key * grid.block_k) & ((key + 1) * grid.block_k - 1 <= last[:, 0][block])
    flags = FIRST * is_first + LAST * is_last + WHOLE * whole
    flags += ROW_FIRST * (is_first & (query == 0)) + ROW_LAST * (is_last & (query == grid.queries - 1))
    # [visits, parts of queries], in parts of keys from the start of the visit's block
    start, stop = (a - key[:, None] * grid.parts_k for a in _part_bounds(intervals, grid, block))
    start, stop = jnp.clip(start, 0, grid.parts_k), jnp.clip(stop, -1, grid.parts_k - 1)
    count = jnp.maximum(stop - start + 1, 0)
    bits = grid.parts_k.bit_length()
    parts = jnp.sum((start | (count << bits)) << (2 * bits * jnp.arange(grid.parts_q)), axis=1)
    codes = grid.code(row, query, key, flags)
    return Visits(codes.astype(jnp.int32), parts.astype(jnp.int32), ends[-1].astype(jnp.int32))


def _part_bounds(intervals: Intervals, grid: Grid, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last key part of the row that each part of the queries of a block sees, int32 [visits, parts]."""
    first, last = (a.reshape(-1, grid.parts_q, grid.part) for a in (intervals.first, intervals.last))
    return first[:, :, 0][block] // grid.part, last[:, :, -1][block] // grid.part


def count_pairs(intervals: Intervals, grid: Grid) -> int:
    """Pairs of a query and a key that the kernels compute, seen or not; on the host."""
    visits = jax.tree.map(np.asarray, jax.jit(make_visits, static_argnums=1)(intervals, grid))
    pairs = 0
    for code, parts in zip(visits.codes[: visits.count].tolist(), visits.parts[: visits.count].tolist()):
        if code & WHOLE:
            pairs += grid.block_q * grid.block_k
        else:
            pairs += grid.part**2 * sum(grid.keys_of_part(parts, part)[1] for part in range(grid.parts_q))
    return pairs
